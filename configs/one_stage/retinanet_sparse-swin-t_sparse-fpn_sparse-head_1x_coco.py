_base_ = [
    '../_base_/models/retinanet_r50_fpn.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/det_1x.py',
    '../_base_/det_runtime.py',
]
pretrained = 'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_tiny_patch4_window7_224.pth'
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdynsparse.SparseSwinTransformer',
        embed_dims=96,
        depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24),
        window_size=7,
        drop_path_rate=0.2,
        convert_weights=True,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained),
        sparsity=dict(keep_ratio=0.7),
    ),
    neck=dict(
        type='mmdynsparse.SparseFPN',
        in_channels=[96, 192, 384, 768],
        sparsity=dict(keep_ratio=0.3),
    ),
    bbox_head=dict(type='mmdynsparse.SparseRetinaHead', sparsity=dict()),
)
custom_hooks = [dict(type='mmdynsparse.SparsityHook', weight=10.0)]
