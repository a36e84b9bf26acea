# The same with attention and FFNs of all stages in cells; stages 2 and 4 follow the predictors of 1
# and 3.
_base_ = './study_mask-rcnn_swin-n_sparse-fpn.py'
sparsity = dict(
    locations={0: (0,), 1: (0,), 2: (0,), 3: (0,)},
    follow=(1, 3),
    cell_size=(14, 7, 7, 1),
    attention=True,
)
model = dict(backbone=dict(sparsity=sparsity))
