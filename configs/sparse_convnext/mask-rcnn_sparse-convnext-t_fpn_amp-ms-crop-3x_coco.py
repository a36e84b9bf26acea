_base_ = [
    '../_base_/models/mask-rcnn_sparse-convnext-t_fpn.py',
    '../_base_/datasets/coco_instance_ms-crop.py',
    '../_base_/schedules/det_amp-3x_layer-decay.py',
    '../_base_/det_runtime.py',
]
