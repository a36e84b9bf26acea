# The same with half of the cells of the FPN's and RPN's finest two levels.
_base_ = './study_mask-rcnn_r50-n.py'
model = dict(
    neck=dict(type='mmdynsparse.SparseFPN', sparsity=dict(keep_ratio=0.5)),
    rpn_head=dict(type='mmdynsparse.SparseRPNHead', sparsity=dict()),
)
