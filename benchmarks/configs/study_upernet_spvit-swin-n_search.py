# Search for a pruned UperNet + Swin-N on a CPU, see pruning_study.py: classes as in
# study_upernet_swin-n.py, learning rates of its new and of its pretrained parameters.
_base_ = '../../configs/spvit/spvit-swin-n_upernet_1xb8-search-400_camvid-256x256.py'
class_weight = [0.5, 0.5, 8.0, 0.5, 1.0, 0.7, 4.0, 1.0, 0.7, 1.5, 2.0]
model = dict(
    decode_head=dict(loss_decode=dict(class_weight=class_weight)),
    auxiliary_head=dict(loss_decode=dict(class_weight=class_weight)),
)
optim_wrapper = dict(
    type='AmpOptimWrapper',
    dtype='bfloat16',
    loss_scale=1.0,
    optimizer=dict(lr=2e-3),
    paramwise_cfg=dict(pretrained_lr_mult=0.1),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=20),
    dict(type='PolyLR', eta_min=1e-6, power=1.0, by_epoch=False, begin=20, end=100),
]
train_dataloader = dict(batch_size=4)
train_cfg = dict(max_iters=100, val_interval=100)
default_hooks = dict(checkpoint=dict(interval=100))
custom_hooks = [
    dict(type='mmdynsparse.SinglePathSearchHook', target=0.5, gate_lr=5e-2, interval=10)
]
