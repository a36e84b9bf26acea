_base_ = './sparse-swin-b_upernet_8xb2-160k_ade20k-512x512.py'
pretrained = 'https://mmassets.onedl.ai/mmsegmentation/v0.5/pretrain/swin/swin_base_patch4_window12_384_22k_20220317-e5c09f74.pth'
model = dict(
    backbone=dict(pretrain_img_size=384, window_size=12, init_cfg=dict(checkpoint=pretrained))
)
