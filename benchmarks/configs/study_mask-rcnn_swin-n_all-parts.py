# The same with all parts sparse: half of the cells of FPN and RPN, 30% of the proposals, half of
# the masks at full resolution. Cells are half as large as usual: images and objects are small.
_base_ = './study_mask-rcnn_swin-n.py'
model = dict(
    neck=dict(type='mmdynsparse.SparseFPN', sparsity=dict(keep_ratio=0.5, cell_size=4)),
    rpn_head=dict(type='mmdynsparse.SparseRPNHead', sparsity=dict()),
    roi_head=dict(
        type='mmdynsparse.SparseStandardRoIHead',
        sparsity=dict(keep_ratio=0.3),
        mask_head=dict(type='mmdynsparse.SparseFCNMaskHead', sparsity=dict(keep_ratio=0.5)),
    ),
)
custom_hooks = [
    dict(type='mmdynsparse.SparsityHook', weight=10.0),
    dict(type='mmdynsparse.DistillationHook', logit_weight=5.0, features=dict(neck=0.5)),
    dict(type='mmdynsparse.FreezePretrained', iters=6),
]
