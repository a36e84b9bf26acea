# The same without the light branch in the backbone, as in the configs for COCO.
_base_ = './study_mask-rcnn_r50-n_sparse-fpn.py'
model = dict(backbone=dict(sparsity=dict(fast_path=None)))
