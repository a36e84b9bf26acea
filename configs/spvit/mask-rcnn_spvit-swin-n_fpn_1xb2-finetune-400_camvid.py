# The config that the pruned model of the search inherits: prune_checkpoint.py --finetune. Until
# then it has the published architecture at half the width.
_base_ = [
    '../sparse_swin/mask-rcnn_swin-n_fpn_1xb2-2k_camvid.py',
    '../_base_/pruning/swin-n.py',
    '../_base_/schedules/iters_400.py',
]
model = dict(backbone=dict(type='mmdynsparse.SparseSwinTransformer', pruning=_base_.spvit_swin_n))
param_scheduler = _base_.scheduler_400
train_cfg = dict(max_iters=400, val_interval=400)
default_hooks = dict(checkpoint=dict(interval=400))
