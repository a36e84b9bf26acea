_base_ = './mask-rcnn_sparse-swin-n_sparse-fpn_1xb2-2k_camvid.py'
model = dict(
    roi_head=dict(
        type='mmdynsparse.SparseStandardRoIHead',
        sparsity=dict(keep_ratio=0.3),
        mask_head=dict(type='mmdynsparse.SparseFCNMaskHead', sparsity=dict(keep_ratio=0.5)),
    )
)
