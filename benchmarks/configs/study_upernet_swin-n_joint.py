# One model for every keep ratio: attention and FFNs of all stages, and the head, at one ratio that
# is sampled anew for each sparse update, with dense updates in turn.
_base_ = './study_upernet_swin-n_attention_sparse-head.py'
model = dict(
    backbone=dict(sparsity=dict(selector='sampled')),
    decode_head=dict(sparsity=dict(selector='sampled')),
)
custom_hooks = [
    dict(type='mmdynsparse.DenseSparseSchedule', keep_ratio=(0.3, 0.9)),
    dict(type='mmdynsparse.SparsityHook', weight=30.0),  # without the schedule
    dict(type='mmdynsparse.DistillationHook', logit_weight=0.5, features=dict(backbone=20.0)),
    dict(type='mmdynsparse.FreezePretrained', iters=20),
]
