# The same with a ResNet-50 V1c of half the width.
_base_ = './study_upernet_swin-n.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdynsparse.SparseResNetV1c',
        depth=50,
        stem_channels=32,
        base_channels=32,
        sparsity=dict(keep_ratio=0.7),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
