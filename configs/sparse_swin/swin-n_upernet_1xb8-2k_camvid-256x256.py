# Dense control: Swin of half the width, small heads, trained from scratch on a CPU. BN instead of
# SyncBN, which torch does not run between CPU processes.
_base_ = [
    '../_base_/models/upernet_swin.py',
    '../_base_/datasets/camvid.py',
    '../_base_/schedules/seg_2k.py',
    '../_base_/seg_runtime.py',
]
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    data_preprocessor=dict(size=(256, 256)),
    backbone=dict(embed_dims=48, drop_path_rate=0.1),
    decode_head=dict(
        in_channels=[48, 96, 192, 384], channels=128, num_classes=11, norm_cfg=norm_cfg
    ),
    auxiliary_head=dict(in_channels=192, channels=64, num_classes=11, norm_cfg=norm_cfg),
)
