# The same with four times the weight of the ratio loss.
_base_ = './study_mask-rcnn_swin-n_sparse-fpn.py'
custom_hooks = [
    dict(type='mmdynsparse.SparsityHook', weight=40.0),
    dict(type='mmdynsparse.DistillationHook', logit_weight=0.5, features=dict(neck=0.5)),
    dict(type='mmdynsparse.FreezePretrained', iters=20),
]
