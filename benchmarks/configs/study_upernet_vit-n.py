# Fine-tuning of a dense UperNet + ViT-N on a CPU, see accuracy_study.py: length, classes and
# learning rate of the pretrained parameters as in study_upernet_swin-n.py.
_base_ = '../../configs/sparse_vit/sparse-vit-n_mln_upernet_1xb8-finetune-400_camvid-256x256.py'
class_weight = [0.5, 0.5, 8.0, 0.5, 1.0, 0.7, 4.0, 1.0, 0.7, 1.5, 2.0]
model = dict(
    decode_head=dict(loss_decode=dict(class_weight=class_weight)),
    auxiliary_head=dict(loss_decode=dict(class_weight=class_weight)),
)
optim_wrapper = dict(
    type='AmpOptimWrapper',
    dtype='bfloat16',
    loss_scale=1.0,
    paramwise_cfg=dict(pretrained_lr_mult=0.015),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=20),
    dict(type='PolyLR', eta_min=1e-6, power=1.0, by_epoch=False, begin=20, end=200),
]
train_cfg = dict(max_iters=200)
kept = dict(weight=0.5, kept_only=True)
custom_hooks = [
    dict(type='mmdynsparse.SparsityHook', weight=10.0),
    dict(type='mmdynsparse.DistillationHook', logit_weight=0.5, features=dict(backbone=kept)),
    dict(type='mmdynsparse.FreezePretrained', iters=33),
]
