# The recipe of the paper, which starts from a dense model (load_from): new parameters learn at the
# full rate, pretrained ones at a fifth of it and, in the first 4% of the training, not at all. Name
# the dense segmentor's whole checkpoint: heads count as pretrained and teach.
_base_ = './seg_160k.py'
optim_wrapper = dict(
    constructor='mmdynsparse.FineTuneOptimWrapperConstructor',
    paramwise_cfg=dict(pretrained_lr_mult=0.2),
)
custom_hooks = [
    dict(type='mmdynsparse.SparsityHook', weight=10.0),
    dict(type='mmdynsparse.DistillationHook', logit_weight=0.5, features=dict(backbone=0.5)),
    dict(type='mmdynsparse.FreezePretrained', iters=6400),
]
