# FFNs of all stages are sparse, one decision a stage.
_base_ = '../../configs/sparse_swin/sparse-swin-s_upernet_8xb2-160k_ade20k-512x512.py'
sparsity = dict(keep_ratio=[0.5] * 4, locations={0: (0,), 1: (0,), 2: (0,), 3: (0,)})
model = dict(backbone=dict(sparsity=sparsity))
