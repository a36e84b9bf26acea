# The neck's predictor chooses the cells of the head as well.
_base_ = './retinanet_r50_sparse-head_1x_coco.py'
model = dict(
    backbone=dict(
        type='mmdynsparse.SparseResNet',
        sparsity=dict(keep_ratio=0.7, fast_path=dict(type='mmdynsparse.LowRankFastPath')),
    ),
    neck=dict(type='mmdynsparse.SparseFPN', sparsity=dict(keep_ratio=0.3)),
    bbox_head=dict(sparsity=dict(_delete_=True)),
)
custom_hooks = [dict(type='mmdynsparse.SparsityHook', weight=10.0)]
