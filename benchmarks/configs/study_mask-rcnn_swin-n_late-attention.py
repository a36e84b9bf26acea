# The same with attention and FFNs of stages 3 and 4 in cells; stage 4 follows the predictor of 3.
_base_ = './study_mask-rcnn_swin-n.py'
sparsity = dict(locations={2: (0,), 3: (0,)}, follow=(3,), cell_size=(1, 1, 7, 1), attention=True)
model = dict(backbone=dict(sparsity=sparsity))
