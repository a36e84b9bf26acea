# Small models from scratch on a CPU, counted in iterations of two images.
_base_ = './det_1x.py'
optim_wrapper = dict(optimizer=dict(lr=3e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=100),
    dict(type='PolyLR', eta_min=1e-6, power=1.0, by_epoch=False, begin=100, end=2000),
]
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=2000, val_interval=500)
default_hooks = dict(
    logger=dict(log_metric_by_epoch=False), checkpoint=dict(by_epoch=False, interval=500)
)
log_processor = dict(by_epoch=False)
auto_scale_lr = dict(base_batch_size=2)
