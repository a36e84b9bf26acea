# Dense RetinaNet with Swin and FPN of half the width, for a CPU. Half the stock anchor scale,
# because images of CamVid are not enlarged.
_base_ = './retinanet_r50_fpn.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='SwinTransformer',
        embed_dims=48,
        depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24),
        window_size=7,
        drop_path_rate=0.1,
    ),
    neck=dict(in_channels=[48, 96, 192, 384], out_channels=128),
    bbox_head=dict(
        num_classes=4,
        in_channels=128,
        feat_channels=128,
        anchor_generator=dict(octave_base_scale=2),
    ),
)
