# Attention and FFNs of stages 3 and 4 in cells of whole windows; stage 4 follows the predictor of
# 3. A detector loses most by its first two stages, as docs/study.md has measured.
_base_ = './mask-rcnn_sparse-swin-t_fpn_1x_coco.py'
sparsity = dict(
    keep_ratio=0.7,
    locations={2: (0,), 3: (0,)},
    follow=(3,),
    cell_size=(1, 1, 7, 7),
    attention=True,
)
model = dict(backbone=dict(sparsity=sparsity))
