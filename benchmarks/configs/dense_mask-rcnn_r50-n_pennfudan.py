# Dense Mask R-CNN with a ResNet-50 V1c of half the width on Penn-Fudan.
_base_ = './dense_mask-rcnn_swin-n_pennfudan.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='ResNet',
        depth=50,
        deep_stem=True,
        stem_channels=32,
        base_channels=32,
        norm_eval=True,
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
