# Dense control, trained from scratch on a CPU.
_base_ = [
    '../_base_/models/retinanet_swin-n_fpn.py',
    '../_base_/datasets/camvid_instance.py',
    '../_base_/schedules/det_2k.py',
    '../_base_/det_runtime.py',
]
val_evaluator = dict(metric='bbox')
test_evaluator = val_evaluator
