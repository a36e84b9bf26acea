# Dense Mask R-CNN + Swin-N on Penn-Fudan (Wang et al., 2007): pedestrians as instances.
_base_ = '../../configs/sparse_swin/mask-rcnn_swin-n_fpn_1xb2-2k_camvid.py'
data_root = 'data/pennfudan/'
metainfo = dict(classes=('pedestrian',), palette=[(220, 20, 60)])
model = dict(roi_head=dict(bbox_head=dict(num_classes=1), mask_head=dict(num_classes=1)))
dataset = dict(data_root=data_root, metainfo=metainfo)
train_dataloader = dict(dataset=dataset)
val_dataloader = dict(dataset=dataset)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'instances/val.json')
test_evaluator = val_evaluator
