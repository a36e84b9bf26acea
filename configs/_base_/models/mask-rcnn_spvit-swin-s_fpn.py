# The published pruned Swin-S.
_base_ = './mask-rcnn_spvit-swin-t_fpn.py'
pretrained = 'pretrain/spvit_swin-s.pth'
model = dict(
    backbone=dict(
        depths=(2, 2, 18, 2),
        pruning=dict(
            mixers=[
                ['conv1', 'none'],
                ['msa'] * 2,
                [*['msa'] * 12, 'none', 'conv1', 'msa', 'msa', 'none', 'none'],
                ['msa'] * 2,
            ],
            hidden=[
                [188, 209],
                [748, 680],
                [
                    *(1159, 1260, 1127, 1036, 919, 916, 868, 918, 903),
                    *(937, 961, 1037, 1063, 996, 888, 866, 741, 509),
                ],
                [3064, 3051],
            ],
        ),
        init_cfg=dict(checkpoint=pretrained),
    )
)
