# Search from a dense model: --cfg-options load_from=DENSE_CHECKPOINT
_base_ = './spvit-deit-s_mln_upernet_8xb2-160k_ade20k-512x512.py'
model = dict(backbone=dict(pruning=dict(_delete_=True, search=True), init_cfg=None))
optim_wrapper = dict(constructor='mmdynsparse.FineTuneOptimWrapperConstructor')
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=150),
    dict(type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin=150, end=16000),
]
train_cfg = dict(max_iters=16000, val_interval=4000)
default_hooks = dict(checkpoint=dict(interval=4000))
custom_hooks = [dict(type='mmdynsparse.SinglePathSearchHook', target=0.73, gate_lr=5e-4)]
