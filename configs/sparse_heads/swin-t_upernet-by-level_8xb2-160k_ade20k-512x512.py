# Without training: takes a checkpoint of mmsegmentation's UperNet + Swin-T as it is.
_base_ = [
    '../_base_/models/upernet_swin.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/seg_160k.py',
    '../_base_/seg_runtime.py',
]
model = dict(decode_head=dict(type='mmdynsparse.SparseUPerHead', sparsity=dict()))
