# The same on Penn-Fudan (Wang et al., 2007): pedestrians and background.
_base_ = './dense_upernet_swin-n_camvid.py'
data_root = 'data/pennfudan'
metainfo = dict(
    _delete_=True, classes=('background', 'pedestrian'), palette=[[0, 0, 0], [220, 20, 60]]
)
model = dict(decode_head=dict(num_classes=2), auxiliary_head=dict(num_classes=2))
dataset = dict(data_root=data_root, metainfo=metainfo)
train_dataloader = dict(dataset=dataset)
val_dataloader = dict(dataset=dataset)
test_dataloader = val_dataloader
