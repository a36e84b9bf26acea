_base_ = './mask-rcnn_sparse-swin-t_late-stages_sparse-fpn_1x_coco.py'
model = dict(
    roi_head=dict(
        type='mmdynsparse.SparseStandardRoIHead',
        sparsity=dict(keep_ratio=0.3),
        mask_head=dict(type='mmdynsparse.SparseFCNMaskHead', sparsity=dict(keep_ratio=0.5)),
    )
)
