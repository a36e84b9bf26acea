_base_ = './upernet_swin.py'
pretrained = 'open-mmlab://resnet50_v1c'
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdynsparse.SparseResNetV1c',
        depth=50,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        contract_dilation=True,
        sparsity=dict(keep_ratio=0.7),
        init_cfg=dict(type='Pretrained', checkpoint=pretrained),
    ),
    decode_head=dict(in_channels=[256, 512, 1024, 2048]),
    auxiliary_head=dict(in_channels=1024),
)
custom_hooks = [dict(type='mmdynsparse.SparsityHook', weight=10.0)]
