# Dense control: ConvNeXt-T of half the width in place of the Swin-N. Without `sparsity` the
# backbone is the dense ConvNeXt.
_base_ = '../sparse_swin/mask-rcnn_swin-n_fpn_1xb2-2k_camvid.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdynsparse.SparseConvNeXt',
        arch=dict(depths=(3, 3, 9, 3), channels=(48, 96, 192, 384)),
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.1,
        layer_scale_init_value=1.0,
        gap_before_final_norm=False,
    )
)
