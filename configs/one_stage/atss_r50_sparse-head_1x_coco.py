_base_ = [
    '../_base_/models/atss_r50_fpn.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/det_sgd-1x.py',
    '../_base_/det_runtime.py',
]
model = dict(bbox_head=dict(type='mmdynsparse.SparseATSSHead', sparsity=dict(keep_ratio=0.3)))
optim_wrapper = dict(optimizer=dict(lr=0.01))
