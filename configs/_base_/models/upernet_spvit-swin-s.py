# The published pruned Swin-S; the authors' checkpoint, by prune_checkpoint.py --source spvit.
_base_ = ['./upernet_swin.py', '../pruning/swin-s.py']
pretrained = 'pretrain/spvit_swin-s.pth'
model = dict(
    backbone=dict(
        type='mmdynsparse.SparseSwinTransformer',
        depths=(2, 2, 18, 2),
        pruning=_base_.spvit_swin_s,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained),
    )
)
