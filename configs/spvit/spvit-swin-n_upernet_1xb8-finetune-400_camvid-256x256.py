# The config that the pruned model of the search inherits: prune_checkpoint.py --finetune. Until
# then it has the published architecture at half the width.
_base_ = ['../sparse_swin/swin-n_upernet_1xb8-2k_camvid-256x256.py', '../_base_/pruning/swin-n.py']
model = dict(backbone=dict(type='mmdynsparse.SparseSwinTransformer', pruning=_base_.spvit_swin_n))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=20),
    dict(type='PolyLR', eta_min=1e-6, power=1.0, by_epoch=False, begin=20, end=400),
]
train_cfg = dict(max_iters=400, val_interval=400)
default_hooks = dict(checkpoint=dict(interval=400))
