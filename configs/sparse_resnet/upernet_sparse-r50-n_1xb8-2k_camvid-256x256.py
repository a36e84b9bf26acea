_base_ = './upernet_r50-n_1xb8-2k_camvid-256x256.py'
model = dict(backbone=dict(type='mmdynsparse.SparseResNetV1c', sparsity=dict(keep_ratio=0.7)))
custom_hooks = [dict(type='mmdynsparse.SparsityHook', weight=10.0)]
