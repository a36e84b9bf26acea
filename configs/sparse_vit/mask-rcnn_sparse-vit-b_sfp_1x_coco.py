# ViTDet trains 100 epochs on 1024 x 1024 with large-scale jitter and layer decay.
_base_ = [
    '../_base_/models/mask-rcnn_sparse-vit-b_sfp.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/det_1x.py',
    '../_base_/det_runtime.py',
]
embeddings = {'pos_embed': dict(decay_mult=0.0), 'cls_token': dict(decay_mult=0.0)}
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=embeddings))
