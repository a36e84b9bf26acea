# Fine-tuning of a dense or pruned UperNet + Swin-N on a CPU, see pruning_study.py: classes and
# length as in study_upernet_swin-n.py, a learning rate with which pruned models recover.
_base_ = '../../configs/sparse_swin/swin-n_upernet_1xb8-2k_camvid-256x256.py'
class_weight = [0.5, 0.5, 8.0, 0.5, 1.0, 0.7, 4.0, 1.0, 0.7, 1.5, 2.0]
model = dict(
    backbone=dict(type='mmdynsparse.SparseSwinTransformer'),
    decode_head=dict(loss_decode=dict(class_weight=class_weight)),
    auxiliary_head=dict(loss_decode=dict(class_weight=class_weight)),
)
optim_wrapper = dict(
    type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0, optimizer=dict(lr=2e-4)
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=20),
    dict(type='PolyLR', eta_min=1e-6, power=1.0, by_epoch=False, begin=20, end=200),
]
train_dataloader = dict(batch_size=4)
train_cfg = dict(max_iters=200)
