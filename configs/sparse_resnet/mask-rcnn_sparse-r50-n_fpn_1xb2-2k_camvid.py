_base_ = './mask-rcnn_r50-n_fpn_1xb2-2k_camvid.py'
model = dict(
    backbone=dict(
        type='mmdynsparse.SparseResNet',
        sparsity=dict(keep_ratio=0.7, fast_path=dict(type='mmdynsparse.LowRankFastPath')),
    )
)
custom_hooks = [dict(type='mmdynsparse.SparsityHook', weight=10.0)]
