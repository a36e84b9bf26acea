# Dense UperNet with Swin of half the width and small heads, for a CPU. BN instead of SyncBN, which
# torch does not run between CPU processes.
_base_ = './upernet_swin.py'
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    backbone=dict(embed_dims=48, drop_path_rate=0.1),
    decode_head=dict(
        in_channels=[48, 96, 192, 384], channels=128, num_classes=11, norm_cfg=norm_cfg
    ),
    auxiliary_head=dict(in_channels=192, channels=64, num_classes=11, norm_cfg=norm_cfg),
)
