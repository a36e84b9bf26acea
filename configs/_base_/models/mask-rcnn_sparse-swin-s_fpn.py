_base_ = './mask-rcnn_sparse-swin_fpn.py'
pretrained = 'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_small_patch4_window7_224.pth'
model = dict(
    backbone=dict(
        depths=(2, 2, 18, 2),
        convert_weights=True,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained),
    )
)
