# The config that the pruned model of the search inherits: prune_checkpoint.py --finetune. Until
# then it has the published architecture at half the width.
_base_ = '../sparse_swin/swin-n_upernet_1xb8-2k_camvid-256x256.py'
model = dict(
    backbone=dict(
        type='mmdynsparse.SparseSwinTransformer',
        pruning=dict(
            mixers=[['conv1', 'none'], ['conv1', 'none'], ['msa'] * 6, ['msa'] * 2],
            hidden=[[93, 76], [323, 252], [675, 660, 645, 625, 617, 541], [1521, 1497]],
        ),
    )
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=20),
    dict(type='PolyLR', eta_min=1e-6, power=1.0, by_epoch=False, begin=20, end=400),
]
train_cfg = dict(max_iters=400, val_interval=400)
default_hooks = dict(checkpoint=dict(interval=400))
