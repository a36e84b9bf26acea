_base_ = [
    '../_base_/models/upernet_sparse-convnext-t.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/seg_amp-160k_layer-decay.py',
    '../_base_/seg_runtime.py',
]
