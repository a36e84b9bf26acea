_base_ = [
    '../_base_/models/mask-rcnn_sparse-swin-s_fpn.py',
    '../_base_/datasets/coco_instance_ms-crop.py',
    '../_base_/schedules/det_3x.py',
    '../_base_/det_runtime.py',
]
