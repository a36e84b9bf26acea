_base_ = '../sparse_swin/sparse-swin-n_upernet_1xb8-2k_camvid-256x256.py'
model = dict(
    decode_head=dict(
        type='mmdynsparse.SparseUPerHead',
        sparsity=dict(keep_ratio=0.3, predictor=dict(type='mmdynsparse.CellPredictor')),
    )
)
