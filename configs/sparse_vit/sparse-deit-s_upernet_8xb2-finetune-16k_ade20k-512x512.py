# Fine-tuning of mmsegmentation's dense model by the recipe of DynamicViT (NeurIPS 2021) in 16k
# iterations: predictors learn at the published rate, pretrained parameters, heads included, at a
# hundredth of it and, in the first sixth of the training (5 of 30 epochs), not at all. Features are
# distilled where the last decision keeps them.
_base_ = './sparse-deit-s_upernet_8xb2-80k_ade20k-512x512.py'
model = dict(backbone=dict(init_cfg=None))
optim_wrapper = dict(
    constructor='mmdynsparse.FineTuneOptimWrapperConstructor',
    optimizer=dict(lr=7.5e-4),
    paramwise_cfg=dict(pretrained_lr_mult=0.01),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=150),
    dict(type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin=150, end=16000),
]
train_cfg = dict(max_iters=16000, val_interval=4000)
default_hooks = dict(checkpoint=dict(interval=4000))
kept = dict(weight=0.5, kept_only=True)
custom_hooks = [
    dict(type='mmdynsparse.SparsityHook', weight=2.0),
    dict(type='mmdynsparse.DistillationHook', logit_weight=0.5, features=dict(backbone=kept)),
    dict(type='mmdynsparse.FreezePretrained', iters=2667),
]
load_from = 'https://mmassets.onedl.ai/mmsegmentation/v0.5/vit/upernet_deit-s16_512x512_80k_ade20k/upernet_deit-s16_512x512_80k_ade20k_20210624_095228-afc93ec2.pth'
