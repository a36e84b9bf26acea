_base_ = './mask-rcnn_swin_fpn.py'
pretrained = 'torchvision://resnet50'
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdynsparse.SparseResNet',
        depth=50,
        frozen_stages=1,
        norm_cfg=dict(type='BN', requires_grad=True),
        norm_eval=True,
        sparsity=dict(keep_ratio=0.7, fast_path=dict(type='mmdynsparse.LowRankFastPath')),
        init_cfg=dict(type='Pretrained', checkpoint=pretrained),
    ),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
)
custom_hooks = [dict(type='mmdynsparse.SparsityHook', weight=10.0)]
