# FFNs and window attention of all stages are sparse, in cells of whole windows. Two predictors
# decide: one for the first two stages, one for the others.
_base_ = '../../configs/sparse_heads/sparse-swin-t_sparse-upernet_8xb2-160k_ade20k-512x512.py'
sparsity = dict(
    keep_ratio=0.5,
    locations={0: (0,), 1: (0,), 2: (0,), 3: (0,)},
    follow=(1, 3),
    cell_size=(28, 14, 7, 7),
    attention=True,
)
model = dict(backbone=dict(sparsity=sparsity))
