# The published pruned DeiT-B; the authors' checkpoint, by prune_checkpoint.py --source spvit.
_base_ = './upernet_swin.py'
pretrained = 'pretrain/spvit_deit-b.pth'
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdynsparse.SparseVisionTransformer',
        img_size=(512, 512),
        embed_dims=768,
        num_layers=12,
        num_heads=12,
        out_indices=(2, 5, 8, 11),
        norm_cfg=dict(type='LN', eps=1e-6),
        patch_bias=True,
        pruning=dict(
            mixers=[*['conv1'] * 3, *['conv3'] * 2, *['msa'] * 7],
            hidden=[1118, 489, 1050, 1345, 1336, 1326, 1431, 1564, 1606, 1702, 1290, 190],
            norm_identity=True,
        ),
        init_cfg=dict(type='Pretrained', checkpoint=pretrained),
    ),
    neck=dict(
        type='MultiLevelNeck',
        in_channels=[768, 768, 768, 768],
        out_channels=768,
        scales=[4, 2, 1, 0.5],
    ),
    decode_head=dict(in_channels=[768, 768, 768, 768]),
    auxiliary_head=dict(in_channels=768, in_index=3),
)
