_base_ = [
    '../_base_/models/upernet_spvit-deit-b_mln.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/seg_160k_vit.py',
    '../_base_/seg_runtime.py',
]
