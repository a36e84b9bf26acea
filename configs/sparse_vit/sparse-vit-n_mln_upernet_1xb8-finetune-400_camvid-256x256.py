# Fine-tuning of a dense ViT-N on a CPU, as of DeiT-S: --cfg-options load_from=DENSE_CHECKPOINT
_base_ = [
    './sparse-vit-n_mln_upernet_1xb8-2k_camvid-256x256.py',
    '../_base_/schedules/iters_400.py',
]
optim_wrapper = dict(
    constructor='mmdynsparse.FineTuneOptimWrapperConstructor',
    optimizer=dict(lr=2e-3),
    paramwise_cfg=dict(pretrained_lr_mult=0.01),
)
param_scheduler = _base_.scheduler_400
train_cfg = dict(max_iters=400, val_interval=400)
default_hooks = dict(checkpoint=dict(interval=400))
kept = dict(weight=0.5, kept_only=True)
custom_hooks = [
    dict(type='mmdynsparse.SparsityHook', weight=10.0),
    dict(type='mmdynsparse.DistillationHook', logit_weight=0.5, features=dict(backbone=kept)),
    dict(type='mmdynsparse.FreezePretrained', iters=67),
]
