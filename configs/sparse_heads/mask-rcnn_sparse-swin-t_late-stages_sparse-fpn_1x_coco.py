_base_ = '../sparse_swin/mask-rcnn_sparse-swin-t_late-stages_fpn_1x_coco.py'
model = dict(
    neck=dict(type='mmdynsparse.SparseFPN', sparsity=dict(keep_ratio=0.5)),
    rpn_head=dict(type='mmdynsparse.SparseRPNHead', sparsity=dict()),
)
