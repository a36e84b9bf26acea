# Search from a dense model: --cfg-options load_from=DENSE_CHECKPOINT
_base_ = './mask-rcnn_spvit-swin-t_fpn_1x_coco.py'
model = dict(backbone=dict(pruning=dict(_delete_=True, search=True), init_cfg=None))
optim_wrapper = dict(constructor='mmdynsparse.FineTuneOptimWrapperConstructor')
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=4, milestones=[3], gamma=0.1),
]
train_cfg = dict(max_epochs=4)
custom_hooks = [
    dict(type='mmdynsparse.SinglePathSearchHook', target=0.74, gate_lr=5e-4, shape=(800, 1280))
]
