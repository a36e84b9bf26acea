# The published pruned DeiT-S.
_base_ = './upernet_spvit-deit-b_mln.py'
pretrained = 'pretrain/spvit_deit-s.pth'
model = dict(
    backbone=dict(
        embed_dims=384,
        num_heads=6,
        drop_path_rate=0.1,
        pruning=dict(
            mixers=['conv1', *['msa'] * 11],
            hidden=[1304, 1399, 1344, 1214, 1251, 1183, 1140, 925, 742, 391, 104, 103],
        ),
        init_cfg=dict(checkpoint=pretrained),
    ),
    neck=dict(in_channels=[384, 384, 384, 384], out_channels=384),
    decode_head=dict(in_channels=[384, 384, 384, 384]),
    auxiliary_head=dict(in_channels=384),
)
