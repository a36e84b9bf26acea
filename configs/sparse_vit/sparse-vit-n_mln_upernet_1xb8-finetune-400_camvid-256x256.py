# Fine-tuning of a dense ViT-N on a CPU, as of DeiT-S: --cfg-options load_from=DENSE_CHECKPOINT
_base_ = './sparse-vit-n_mln_upernet_1xb8-2k_camvid-256x256.py'
optim_wrapper = dict(
    constructor='mmdynsparse.FineTuneOptimWrapperConstructor',
    optimizer=dict(lr=2e-3),
    paramwise_cfg=dict(pretrained_lr_mult=0.01),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=20),
    dict(type='PolyLR', eta_min=1e-6, power=1.0, by_epoch=False, begin=20, end=400),
]
train_cfg = dict(max_iters=400, val_interval=400)
default_hooks = dict(checkpoint=dict(interval=400))
kept = dict(weight=0.5, kept_only=True)
custom_hooks = [
    dict(type='mmdynsparse.SparsityHook', weight=10.0),
    dict(type='mmdynsparse.DistillationHook', logit_weight=0.5, features=dict(backbone=kept)),
    dict(type='mmdynsparse.FreezePretrained', iters=67),
]
