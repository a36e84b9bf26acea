# Small models from scratch on a CPU: ten times the learning rate of the long schedules.
_base_ = './seg_160k.py'
optim_wrapper = dict(optimizer=dict(lr=6e-4, weight_decay=0.05))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=100),
    dict(type='PolyLR', eta_min=1e-6, power=1.0, by_epoch=False, begin=100, end=2000),
]
train_cfg = dict(max_iters=2000, val_interval=500)
default_hooks = dict(checkpoint=dict(interval=500))
