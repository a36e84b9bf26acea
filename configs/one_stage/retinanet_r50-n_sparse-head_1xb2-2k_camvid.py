# Half the width and half the stock anchor scale, because images of CamVid are not enlarged. From
# random weights, batch norms learn and nothing is frozen.
_base_ = [
    '../_base_/models/retinanet_r50_fpn.py',
    '../_base_/datasets/camvid_instance.py',
    '../_base_/schedules/det_2k.py',
    '../_base_/det_runtime.py',
]
model = dict(
    backbone=dict(
        stem_channels=32, base_channels=32, frozen_stages=-1, norm_eval=False, init_cfg=None
    ),
    neck=dict(in_channels=[128, 256, 512, 1024], out_channels=128),
    bbox_head=dict(
        type='mmdynsparse.SparseRetinaHead',
        num_classes=4,
        in_channels=128,
        feat_channels=128,
        anchor_generator=dict(octave_base_scale=2),
        sparsity=dict(keep_ratio=0.3, cell_size=4),
    ),
)
val_evaluator = dict(metric='bbox')
test_evaluator = val_evaluator
