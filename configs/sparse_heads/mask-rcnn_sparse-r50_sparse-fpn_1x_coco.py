_base_ = '../sparse_resnet/mask-rcnn_sparse-r50_fpn_1x_coco.py'
model = dict(
    neck=dict(type='mmdynsparse.SparseFPN', sparsity=dict(keep_ratio=0.5)),
    rpn_head=dict(type='mmdynsparse.SparseRPNHead', sparsity=dict()),
)
