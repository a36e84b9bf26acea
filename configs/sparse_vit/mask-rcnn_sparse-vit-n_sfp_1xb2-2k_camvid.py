_base_ = './mask-rcnn_vit-n_sfp_1xb2-2k_camvid.py'
model = dict(backbone=dict(sparsity=dict(keep_ratio=0.7)))
custom_hooks = [dict(type='mmdynsparse.SparsityHook', weight=10.0)]
