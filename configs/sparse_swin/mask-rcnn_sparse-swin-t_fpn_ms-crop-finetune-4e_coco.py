# Fine-tuning of mmdetection's dense model.
_base_ = [
    '../_base_/models/mask-rcnn_swin_fpn.py',
    '../_base_/datasets/coco_instance_ms-crop.py',
    '../_base_/schedules/det_sparse-4e.py',
    '../_base_/det_runtime.py',
]
model = dict(backbone=dict(type='mmdynsparse.SparseSwinTransformer', sparsity=dict(keep_ratio=0.7)))
load_from = 'https://download.openmmlab.com/mmdetection/v2.0/swin/mask_rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco/mask_rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco_20210906_131725-bacf6f7b.pth'
