# The same with half of the cells in place of 30%.
_base_ = './study_mask-rcnn_swin-n_sparse-fpn_w40.py'
model = dict(neck=dict(sparsity=dict(keep_ratio=0.5)))
