# The same with a sparse head: by level, and in half of the cells, which a predictor chooses.
_base_ = './study_upernet_swin-n_attention.py'
model = dict(
    decode_head=dict(
        type='mmdynsparse.SparseUPerHead',
        sparsity=dict(keep_ratio=0.5, predictor=dict(type='mmdynsparse.CellPredictor')),
    )
)
