# Fine-tuning of a dense Mask R-CNN + Swin-N on a CPU, see accuracy_study.py.
_base_ = '../../configs/sparse_swin/mask-rcnn_sparse-swin-n_fpn_1xb2-finetune-400_camvid.py'
optim_wrapper = dict(optimizer=dict(lr=2e-3), paramwise_cfg=dict(pretrained_lr_mult=0.03))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=20),
    dict(type='PolyLR', eta_min=1e-6, power=1.0, by_epoch=False, begin=20, end=200),
]
train_cfg = dict(max_iters=200)
custom_hooks = [
    dict(type='mmdynsparse.SparsityHook', weight=10.0),
    dict(type='mmdynsparse.DistillationHook', logit_weight=0.5, features=dict(neck=0.5)),
    dict(type='mmdynsparse.FreezePretrained', iters=6),
]
