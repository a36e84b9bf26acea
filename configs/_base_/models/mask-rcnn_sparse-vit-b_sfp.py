# As in ViTDet (Li et al., arXiv 2203.16527): a plain ViT, pretrained by MAE, and a pyramid made of
# its last map. Unlike there all layers attend to the whole image, not 8 of 12 within windows, there
# are no relative positions, and the heads are those of the other Mask R-CNN configs.
_base_ = './mask-rcnn_swin_fpn.py'
pretrained = 'pretrain/mae_pretrain_vit_base.pth'
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdynsparse.SparseVisionTransformer',
        embed_dims=768,
        num_layers=12,
        num_heads=12,
        drop_path_rate=0.1,
        patch_bias=True,
        norm_cfg=dict(type='LN', eps=1e-6),
        sparsity=dict(keep_ratio=0.7),
        init_cfg=dict(type='Pretrained', checkpoint=pretrained),
    ),
    neck=dict(
        _delete_=True,
        type='mmdynsparse.SimpleFeaturePyramid',
        in_channels=768,
        out_channels=256,
        num_outs=5,
    ),
)
custom_hooks = [dict(type='mmdynsparse.SparsityHook', weight=5.0)]
