# Attention and FFNs of all stages in cells of whole windows; stages 2 and 4 follow the predictors
# of 1 and 3.
_base_ = './mask-rcnn_sparse-swin-t_fpn_1x_coco.py'
sparsity = dict(
    keep_ratio=0.7,
    locations={0: (0,), 1: (0,), 2: (0,), 3: (0,)},
    follow=(1, 3),
    cell_size=(28, 14, 7, 7),
    attention=True,
)
model = dict(backbone=dict(sparsity=sparsity))
