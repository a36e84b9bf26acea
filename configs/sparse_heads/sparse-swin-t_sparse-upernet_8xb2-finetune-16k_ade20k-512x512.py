_base_ = '../sparse_swin/sparse-swin-t_upernet_8xb2-finetune-16k_ade20k-512x512.py'
model = dict(
    decode_head=dict(
        type='mmdynsparse.SparseUPerHead',
        sparsity=dict(keep_ratio=0.3, predictor=dict(type='mmdynsparse.CellPredictor')),
    )
)
# The head's own logits are what changes most, so they weigh more than in the recipe.
custom_hooks = [
    dict(type='mmdynsparse.SparsityHook', weight=10.0),
    dict(type='mmdynsparse.DistillationHook', logit_weight=5.0, features=dict(backbone=20.0)),
    dict(type='mmdynsparse.FreezePretrained', iters=640),
]
