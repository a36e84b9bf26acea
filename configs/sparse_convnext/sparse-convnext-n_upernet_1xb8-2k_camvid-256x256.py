_base_ = './convnext-n_upernet_1xb8-2k_camvid-256x256.py'
model = dict(backbone=dict(sparsity=dict(keep_ratio=0.7)))
custom_hooks = [dict(type='mmdynsparse.SparsityHook', weight=10.0)]
