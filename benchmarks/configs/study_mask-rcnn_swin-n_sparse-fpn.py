# The same with 60% of the cells of the FPN's and RPN's finest two levels. Logits weigh more in the
# distillation, because the RPN's are what changes most.
_base_ = './study_mask-rcnn_swin-n.py'
model = dict(
    neck=dict(type='mmdynsparse.SparseFPN', sparsity=dict(keep_ratio=0.6)),
    rpn_head=dict(type='mmdynsparse.SparseRPNHead', sparsity=dict()),
)
custom_hooks = [
    dict(type='mmdynsparse.SparsityHook', weight=10.0),
    dict(type='mmdynsparse.DistillationHook', logit_weight=5.0, features=dict(neck=0.5)),
    dict(type='mmdynsparse.FreezePretrained', iters=6),
]
