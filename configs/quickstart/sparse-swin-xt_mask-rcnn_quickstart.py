_base_ = './swin-xt_mask-rcnn_quickstart.py'

# Start it from the dense model's checkpoint: --cfg-options load_from=CHECKPOINT
model = dict(
    backbone=dict(
        type='mmdynsparse.SparseSwinTransformer',
        sparsity=dict(locations={2: (1, 2, 3)}, keep_ratio=0.7),
    )
)
custom_hooks = [dict(type='mmdynsparse.SparsityHook', weight=10.0)]
