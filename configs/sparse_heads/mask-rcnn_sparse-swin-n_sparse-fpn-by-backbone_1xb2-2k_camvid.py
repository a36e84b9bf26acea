# The backbone's predictors decide for the neck as well, and so for the RPN.
_base_ = '../sparse_swin/mask-rcnn_sparse-swin-n_fpn_1xb2-2k_camvid.py'
model = dict(
    neck=dict(type='mmdynsparse.SparseFPN', sparsity=dict(keep_ratio=0.5, predictor='backbone')),
    rpn_head=dict(type='mmdynsparse.SparseRPNHead', sparsity=dict()),
)
