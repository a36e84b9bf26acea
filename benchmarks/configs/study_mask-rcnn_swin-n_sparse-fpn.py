# The same with half of the cells of the FPN's and RPN's finest two levels. Cells are half as large
# as usual, because images and objects are small. Only the neck's predictor is trained: --start a
# checkpoint fine-tuned without it, --iters 140. The ratio loss weighs more, because so short a
# training is otherwise over before the neck keeps no more than half.
_base_ = './study_mask-rcnn_swin-n.py'
model = dict(
    neck=dict(type='mmdynsparse.SparseFPN', sparsity=dict(keep_ratio=0.5, cell_size=4)),
    rpn_head=dict(type='mmdynsparse.SparseRPNHead', sparsity=dict()),
)
custom_hooks = [
    dict(type='mmdynsparse.SparsityHook', weight=30.0),
    dict(type='mmdynsparse.DistillationHook', logit_weight=5.0, features=dict(neck=0.5)),
    dict(type='mmdynsparse.FreezePretrained', iters=140, new_parts=('neck.decider',)),
]
