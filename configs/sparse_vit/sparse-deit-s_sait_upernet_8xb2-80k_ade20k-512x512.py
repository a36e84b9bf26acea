# One decision, by the attention that tokens receive: nothing new has weights, so a dense segmentor
# is a checkpoint of this one, at any keep ratio (load_from). Its last layer says what matters, and
# dense and sparse updates take turns.
_base_ = './sparse-deit-s_upernet_8xb2-80k_ade20k-512x512.py'
model = dict(
    backbone=dict(
        sparsity=dict(
            keep_ratio=0.47,
            locations={0: (3,)},
            predictor=dict(type='mmdynsparse.AttentionScore', queries='mean'),
        )
    )
)
custom_hooks = [
    dict(type='mmdynsparse.SparsityHook'),
    dict(type='mmdynsparse.DenseSparseSchedule', keep_ratio=(0.3, 0.9)),
    dict(type='mmdynsparse.DistillationHook', importance=dict(weight=1.0, target='mean')),
]
val_cfg = dict(
    _delete_=True, type='mmdynsparse.MultiBudgetValLoop', keep_ratios=[1.0, 0.7, 0.47, 0.3]
)
