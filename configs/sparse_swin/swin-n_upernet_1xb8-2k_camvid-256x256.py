# Dense control, trained from scratch on a CPU.
_base_ = [
    '../_base_/models/upernet_swin-n.py',
    '../_base_/datasets/camvid.py',
    '../_base_/schedules/seg_2k.py',
    '../_base_/seg_runtime.py',
]
model = dict(data_preprocessor=dict(size=(256, 256)))
