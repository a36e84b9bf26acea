# The same in a tenth of the iterations of the dense schedule. The backbone's features weigh much
# more in the distillation, without which predictors learn little in so short a time
# (docs/study.md).
_base_ = './seg_sparse-160k.py'
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=150),
    dict(type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin=150, end=16000),
]
train_cfg = dict(max_iters=16000, val_interval=4000)
default_hooks = dict(checkpoint=dict(interval=4000))
custom_hooks = [
    dict(type='mmdynsparse.SparsityHook', weight=10.0),
    dict(type='mmdynsparse.DistillationHook', logit_weight=0.5, features=dict(backbone=20.0)),
    dict(type='mmdynsparse.FreezePretrained', iters=640),
]
