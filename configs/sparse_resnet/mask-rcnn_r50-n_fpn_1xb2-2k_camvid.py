# Dense control: ResNet-50 of half the width in place of the Swin-N. From random weights, batch
# norms learn and nothing is frozen.
_base_ = '../sparse_swin/mask-rcnn_swin-n_fpn_1xb2-2k_camvid.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='ResNet',
        depth=50,
        stem_channels=32,
        base_channels=32,
        norm_eval=False,
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
