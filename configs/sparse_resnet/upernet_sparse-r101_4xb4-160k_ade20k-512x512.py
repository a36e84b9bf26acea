_base_ = [
    '../_base_/models/upernet_sparse-r101.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/seg_sgd-160k_resnet.py',
    '../_base_/seg_runtime.py',
]
train_dataloader = dict(batch_size=4)
