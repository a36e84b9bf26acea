# Search on a CPU, from a dense model: --cfg-options load_from=DENSE_CHECKPOINT
_base_ = '../sparse_swin/swin-n_upernet_1xb8-2k_camvid-256x256.py'
model = dict(backbone=dict(type='mmdynsparse.SparseSwinTransformer', pruning=dict(search=True)))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=20),
    dict(type='PolyLR', eta_min=1e-6, power=1.0, by_epoch=False, begin=20, end=400),
]
train_cfg = dict(max_iters=400, val_interval=400)
default_hooks = dict(checkpoint=dict(interval=400))
optim_wrapper = dict(constructor='mmdynsparse.FineTuneOptimWrapperConstructor')
custom_hooks = [
    dict(type='mmdynsparse.SinglePathSearchHook', target=0.75, gate_lr=5e-2, interval=10)
]
