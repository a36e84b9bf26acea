# The same without the light branch, as in the configs for COCO.
_base_ = './study_mask-rcnn_r50-n.py'
model = dict(backbone=dict(sparsity=dict(fast_path=None)))
