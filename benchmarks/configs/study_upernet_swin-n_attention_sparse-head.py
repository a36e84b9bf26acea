# The same with a sparse head: by level, and in 30% of the cells, which a predictor chooses. The
# ratio loss weighs more: at 10 the second predictor keeps everything in training.
_base_ = './study_upernet_swin-n_attention.py'
model = dict(
    decode_head=dict(
        type='mmdynsparse.SparseUPerHead',
        sparsity=dict(keep_ratio=0.3, predictor=dict(type='mmdynsparse.CellPredictor')),
    )
)
custom_hooks = [
    dict(type='mmdynsparse.SparsityHook', weight=30.0),
    dict(type='mmdynsparse.DistillationHook', logit_weight=0.5, features=dict(backbone=20.0)),
    dict(type='mmdynsparse.FreezePretrained', iters=20),
]
