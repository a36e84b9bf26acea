_base_ = './upernet_swin.py'
pretrained = 'pretrain/vit_base_patch16_224.pth'
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
        sparsity=dict(keep_ratio=0.7),
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
custom_hooks = [dict(type='mmdynsparse.SparsityHook', weight=5.0)]
