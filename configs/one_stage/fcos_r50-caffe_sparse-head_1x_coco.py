_base_ = [
    '../_base_/models/fcos_r50-caffe_fpn.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/det_sgd-1x.py',
    '../_base_/det_runtime.py',
]
model = dict(bbox_head=dict(type='mmdynsparse.SparseFCOSHead', sparsity=dict(keep_ratio=0.3)))
optim_wrapper = dict(
    optimizer=dict(lr=0.01),
    paramwise_cfg=dict(bias_lr_mult=2.0, bias_decay_mult=0.0),
    clip_grad=dict(max_norm=35, norm_type=2),
)
