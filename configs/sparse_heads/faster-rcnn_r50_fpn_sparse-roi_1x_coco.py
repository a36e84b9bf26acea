# Without training: takes a checkpoint of mmdetection's config as it is.
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
model = dict(roi_head=dict(type='mmdynsparse.SparseStandardRoIHead', sparsity=dict(keep_ratio=0.3)))
