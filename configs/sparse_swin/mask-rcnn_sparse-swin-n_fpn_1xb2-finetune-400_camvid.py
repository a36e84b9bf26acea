# Fine-tuning of a dense Swin-N on a CPU: --cfg-options load_from=DENSE_CHECKPOINT
_base_ = [
    '../_base_/models/mask-rcnn_swin-n_fpn.py',
    '../_base_/datasets/camvid_instance.py',
    '../_base_/schedules/det_sparse-4e.py',
    '../_base_/det_runtime.py',
    '../_base_/schedules/iters_400.py',
]
model = dict(backbone=dict(type='mmdynsparse.SparseSwinTransformer', sparsity=dict(keep_ratio=0.7)))
optim_wrapper = dict(optimizer=dict(lr=3e-4))
param_scheduler = _base_.scheduler_400
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=400, val_interval=400)
default_hooks = dict(
    logger=dict(log_metric_by_epoch=False), checkpoint=dict(by_epoch=False, interval=400)
)
log_processor = dict(by_epoch=False)
auto_scale_lr = dict(base_batch_size=2)
custom_hooks = [
    dict(type='mmdynsparse.SparsityHook', weight=10.0),
    dict(type='mmdynsparse.DistillationHook', logit_weight=0.5, features=dict(neck=0.5)),
    dict(type='mmdynsparse.FreezePretrained', iters=16),
]
