# Dense control, trained from scratch on a CPU: ViT-S of half the width in place of the Swin-N.
# mmdetection has no vision transformer; ours is dense without sparsity.
_base_ = '../sparse_swin/mask-rcnn_swin-n_fpn_1xb2-2k_camvid.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdynsparse.SparseVisionTransformer',
        img_size=(384, 480),
        embed_dims=192,
        num_layers=12,
        num_heads=3,
        drop_path_rate=0.1,
        norm_cfg=dict(type='LN', eps=1e-6),
    ),
    neck=dict(
        _delete_=True,
        type='mmdynsparse.SimpleFeaturePyramid',
        in_channels=192,
        out_channels=128,
        num_outs=5,
    ),
)
embeddings = {'pos_embed': dict(decay_mult=0.0), 'cls_token': dict(decay_mult=0.0)}
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=embeddings))
