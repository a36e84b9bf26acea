# Dense control: ViT-S of half the width in place of the Swin-N. Test images are padded to whole
# patches at all levels of the neck.
_base_ = '../sparse_swin/swin-n_upernet_1xb8-2k_camvid-256x256.py'
model = dict(
    data_preprocessor=dict(test_cfg=dict(size_divisor=32)),
    backbone=dict(
        _delete_=True,
        type='VisionTransformer',
        img_size=(256, 256),
        embed_dims=192,
        num_layers=12,
        num_heads=3,
        out_indices=(2, 5, 8, 11),
        drop_path_rate=0.1,
        norm_cfg=dict(type='LN', eps=1e-6),
    ),
    neck=dict(
        type='MultiLevelNeck',
        in_channels=[192, 192, 192, 192],
        out_channels=192,
        scales=[4, 2, 1, 0.5],
    ),
    decode_head=dict(in_channels=[192, 192, 192, 192]),
    auxiliary_head=dict(in_index=3),
)
