# Dense control, trained from scratch on a CPU.
_base_ = [
    '../_base_/models/mask-rcnn_swin-n_fpn.py',
    '../_base_/datasets/camvid_instance.py',
    '../_base_/schedules/det_2k.py',
    '../_base_/det_runtime.py',
]
