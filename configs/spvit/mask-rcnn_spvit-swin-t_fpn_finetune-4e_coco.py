# The config that the pruned model of the search inherits: prune_checkpoint.py --finetune.
_base_ = './mask-rcnn_spvit-swin-t_fpn_1x_coco.py'
model = dict(backbone=dict(init_cfg=None, pruning=dict(norm_identity=False)))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=4, milestones=[3], gamma=0.1),
]
train_cfg = dict(max_epochs=4)
