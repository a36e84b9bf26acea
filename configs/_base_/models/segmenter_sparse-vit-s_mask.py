_base_ = './segmenter_sparse-vit-b_mask.py'
pretrained = 'https://mmassets.onedl.ai/mmsegmentation/v0.5/pretrain/segmenter/vit_small_p16_384_20220308-410f6037.pth'
model = dict(
    backbone=dict(embed_dims=384, num_heads=6, init_cfg=dict(checkpoint=pretrained)),
    decode_head=dict(in_channels=384, channels=384, num_heads=6, embed_dims=384),
)
custom_hooks = [dict(type='mmdynsparse.SparsityHook', weight=2.0)]
