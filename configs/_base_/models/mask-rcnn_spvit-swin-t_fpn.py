# The published pruned Swin-T; the authors' checkpoint, by prune_checkpoint.py --source spvit.
_base_ = './mask-rcnn_swin_fpn.py'
pretrained = 'pretrain/spvit_swin-t.pth'
model = dict(
    backbone=dict(
        type='mmdynsparse.SparseSwinTransformer',
        pruning=dict(
            mixers=[['conv1', 'none'], ['conv1', 'none'], ['msa'] * 6, ['msa'] * 2],
            hidden=[[186, 152], [646, 504], [1350, 1319, 1289, 1249, 1234, 1082], [3041, 2994]],
            norm_identity=True,
        ),
        init_cfg=dict(type='Pretrained', checkpoint=pretrained),
    )
)
