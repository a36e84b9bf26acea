# Dense Mask R-CNN with Swin and FPN of half the width and a quarter of the stock RoIs per image,
# for a CPU. Half the stock anchor scale, because images of CamVid are not enlarged.
_base_ = './mask-rcnn_swin_fpn.py'
model = dict(
    backbone=dict(embed_dims=48, drop_path_rate=0.1),
    neck=dict(in_channels=[48, 96, 192, 384], out_channels=128),
    rpn_head=dict(in_channels=128, feat_channels=128, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=128),
        bbox_head=dict(in_channels=128, fc_out_channels=512, num_classes=4),
        mask_roi_extractor=dict(out_channels=128),
        mask_head=dict(in_channels=128, conv_out_channels=128, num_classes=4),
    ),
    train_cfg=dict(rcnn=dict(sampler=dict(num=128))),
)
