# Dense UperNet with a ResNet-50 V1c of half the width on CamVid.
_base_ = './dense_upernet_swin-n_camvid.py'
model = dict(
    backbone=dict(_delete_=True, type='ResNetV1c', depth=50, stem_channels=32, base_channels=32),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
