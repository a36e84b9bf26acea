_base_ = './mask-rcnn_sparse-swin_fpn.py'
pretrained = 'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_tiny_patch4_window7_224.pth'
model = dict(
    backbone=dict(convert_weights=True, init_cfg=dict(type='Pretrained', checkpoint=pretrained))
)
