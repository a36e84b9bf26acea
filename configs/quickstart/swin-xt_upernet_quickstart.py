_base_ = ['./_base_/backbone.py', './_base_/runtime.py']

default_scope = 'mmseg'
data_root = 'data/quickstart'
crop_size = (224, 224)
metainfo = dict(
    classes=('sky', 'grass', 'road', 'water', 'house', 'tree', 'car', 'person', 'bird'),
    palette=[
        [120, 180, 230],
        [110, 170, 60],
        [128, 128, 128],
        [30, 90, 200],
        [200, 60, 40],
        [20, 100, 30],
        [240, 200, 0],
        [255, 0, 200],
        [60, 20, 80],
    ],
)

model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=crop_size,
    ),
    decode_head=dict(
        type='UPerHead',
        in_channels=[32, 64, 128, 256],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=64,
        dropout_ratio=0.1,
        num_classes=9,
        norm_cfg=dict(type='BN'),
        align_corners=False,
        # Objects fill few of the pixels.
        loss_decode=dict(type='CrossEntropyLoss', class_weight=[1, 1, 1, 1, 5, 5, 5, 8, 20]),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)

dataset = dict(type='BaseSegDataset', data_root=data_root, metainfo=metainfo)
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path='images/train', seg_map_path='annotations/train'),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            # From whole scenes, as pyramid pooling sees them in tests, to enlarged objects.
            dict(type='RandomResize', scale=(512, 512), ratio_range=(0.45, 1.2), keep_ratio=True),
            dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PackSegInputs'),
        ],
    ),
)
test_dataloader = dict(
    batch_size=1,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path='images/val', seg_map_path='annotations/val'),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(type='PackSegInputs'),
        ],
    ),
)
test_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])

default_hooks = dict(visualization=dict(type='SegVisualizationHook'))
visualizer = dict(
    type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer'
)
