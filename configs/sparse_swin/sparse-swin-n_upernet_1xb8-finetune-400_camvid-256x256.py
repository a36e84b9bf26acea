# Fine-tuning of a dense Swin-N on a CPU: --cfg-options load_from=DENSE_CHECKPOINT
_base_ = [
    '../_base_/models/upernet_swin-n.py',
    '../_base_/datasets/camvid.py',
    '../_base_/schedules/seg_sparse-16k.py',
    '../_base_/seg_runtime.py',
    '../_base_/schedules/iters_400.py',
]
model = dict(
    data_preprocessor=dict(size=(256, 256)),
    backbone=dict(type='mmdynsparse.SparseSwinTransformer', sparsity=dict(keep_ratio=0.7)),
)
optim_wrapper = dict(optimizer=dict(lr=6e-4, weight_decay=0.05))
param_scheduler = _base_.scheduler_400
train_cfg = dict(max_iters=400, val_interval=400)
default_hooks = dict(checkpoint=dict(interval=400))
custom_hooks = [
    dict(type='mmdynsparse.SparsityHook', weight=10.0),
    dict(type='mmdynsparse.DistillationHook', logit_weight=0.5, features=dict(backbone=20.0)),
    dict(type='mmdynsparse.FreezePretrained', iters=40),
]
