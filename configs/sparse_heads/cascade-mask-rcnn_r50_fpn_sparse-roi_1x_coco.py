# Without training: takes a checkpoint of mmdetection's config as it is.
_base_ = 'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py'
model = dict(
    roi_head=dict(
        type='mmdynsparse.SparseCascadeRoIHead',
        sparsity=dict(keep_ratio=0.3),
        mask_head=dict(type='mmdynsparse.SparseFCNMaskHead', sparsity=dict(keep_ratio=0.5)),
    )
)
