# The config that the pruned model of the search inherits: prune_checkpoint.py --finetune. Until
# then it has the published architecture at half the width.
_base_ = [
    '../sparse_vit/vit-n_mln_upernet_1xb8-2k_camvid-256x256.py',
    '../_base_/schedules/iters_400.py',
]
model = dict(
    backbone=dict(
        type='mmdynsparse.SparseVisionTransformer',
        pruning=dict(
            mixers=['conv1', *['msa'] * 11],
            hidden=[652, 700, 672, 607, 626, 592, 570, 463, 371, 196, 52, 52],
        ),
    )
)
param_scheduler = _base_.scheduler_400
train_cfg = dict(max_iters=400, val_interval=400)
default_hooks = dict(checkpoint=dict(interval=400))
