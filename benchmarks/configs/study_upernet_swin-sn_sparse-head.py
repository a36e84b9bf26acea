# The same with 18 blocks in stage 3: half-width Swin-S in place of Swin-T.
_base_ = './study_upernet_swin-n_sparse-head.py'
model = dict(backbone=dict(depths=(2, 2, 18, 2)))
