_base_ = './upernet_sparse-r50.py'
pretrained = 'open-mmlab://resnet101_v1c'
model = dict(backbone=dict(depth=101, init_cfg=dict(checkpoint=pretrained)))
