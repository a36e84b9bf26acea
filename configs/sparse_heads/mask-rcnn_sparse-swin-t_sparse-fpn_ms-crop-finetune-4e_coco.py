_base_ = '../sparse_swin/mask-rcnn_sparse-swin-t_fpn_ms-crop-finetune-4e_coco.py'
model = dict(
    neck=dict(type='mmdynsparse.SparseFPN', sparsity=dict(keep_ratio=0.5)),
    rpn_head=dict(type='mmdynsparse.SparseRPNHead', sparsity=dict()),
)
# The RPN's logits are what changes most, so they weigh more than in the recipe.
custom_hooks = [
    dict(type='mmdynsparse.SparsityHook', weight=10.0),
    dict(type='mmdynsparse.DistillationHook', logit_weight=5.0, features=dict(neck=0.5)),
    dict(type='mmdynsparse.FreezePretrained', iters=1200),
]
