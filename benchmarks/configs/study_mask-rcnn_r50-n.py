# The same with a ResNet-50 V1c of half the width.
_base_ = './study_mask-rcnn_swin-n.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdynsparse.SparseResNet',
        depth=50,
        deep_stem=True,
        stem_channels=32,
        base_channels=32,
        norm_eval=True,
        sparsity=dict(keep_ratio=0.7),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
