_base_ = [
    '../_base_/models/mask-rcnn_sparse-r50_fpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/det_sgd-2x.py',
    '../_base_/det_runtime.py',
]
