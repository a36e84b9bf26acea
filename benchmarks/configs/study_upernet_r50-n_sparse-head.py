# The same with a sparse head: by level, and in 30% of the cells, which a predictor
# chooses. Its logits weigh more in the distillation, because it is what changes most.
_base_ = './study_upernet_r50-n.py'
model = dict(
    decode_head=dict(
        type='mmdynsparse.SparseUPerHead',
        sparsity=dict(keep_ratio=0.3, predictor=dict(type='mmdynsparse.CellPredictor')),
    )
)
custom_hooks = [
    dict(type='mmdynsparse.SparsityHook', weight=10.0),
    dict(type='mmdynsparse.DistillationHook', logit_weight=5.0, features=dict(backbone=20.0)),
    dict(type='mmdynsparse.FreezePretrained', iters=20),
]
