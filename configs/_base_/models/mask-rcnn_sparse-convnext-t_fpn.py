_base_ = './mask-rcnn_swin_fpn.py'
pretrained = 'https://mmassets.onedl.ai/mmclassification/v0/convnext/downstream/convnext-tiny_3rdparty_32xb128-noema_in1k_20220301-795e9634.pth'
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdynsparse.SparseConvNeXt',
        arch='tiny',
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.4,
        layer_scale_init_value=1.0,
        gap_before_final_norm=False,
        sparsity=dict(keep_ratio=0.7),
        init_cfg=dict(type='Pretrained', checkpoint=pretrained),
    )
)
custom_hooks = [dict(type='mmdynsparse.SparsityHook', weight=10.0)]
