# The same with a ResNet-50 V1c of half the width. Cells are half as large as usual, because images
# and objects are small, and dropped ones get a light branch.
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
        sparsity=dict(
            keep_ratio=0.7,
            cell_size=(8, 4, 2, 2),
            fast_path=dict(type='mmdynsparse.LowRankFastPath'),
        ),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
