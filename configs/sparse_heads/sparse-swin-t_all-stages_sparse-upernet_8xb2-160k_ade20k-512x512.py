_base_ = '../sparse_swin/sparse-swin-t_all-stages_upernet_8xb2-160k_ade20k-512x512.py'
model = dict(
    decode_head=dict(
        type='mmdynsparse.SparseUPerHead',
        sparsity=dict(keep_ratio=0.3, predictor=dict(type='mmdynsparse.CellPredictor')),
    )
)
