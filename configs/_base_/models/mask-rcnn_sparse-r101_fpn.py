_base_ = './mask-rcnn_sparse-r50_fpn.py'
pretrained = 'torchvision://resnet101'
model = dict(backbone=dict(depth=101, init_cfg=dict(checkpoint=pretrained)))
