# The published pruned Swin-T; the authors' checkpoint, by prune_checkpoint.py --source spvit.
_base_ = ['./upernet_swin.py', '../pruning/swin-t.py']
pretrained = 'pretrain/spvit_swin-t.pth'
model = dict(
    backbone=dict(
        type='mmdynsparse.SparseSwinTransformer',
        pruning=_base_.spvit_swin_t,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained),
    )
)
