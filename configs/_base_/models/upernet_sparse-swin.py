_base_ = './upernet_swin.py'
model = dict(backbone=dict(type='mmdynsparse.SparseSwinTransformer', sparsity=dict(keep_ratio=0.7)))
custom_hooks = [dict(type='mmdynsparse.SparsityHook', weight=10.0)]
