_base_ = [
    '../_base_/models/segmenter_sparse-vit-s_mask.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/seg_sgd-160k.py',
    '../_base_/seg_runtime.py',
]
train_dataloader = dict(batch_size=1)
