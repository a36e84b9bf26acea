# The same with a sparse head whose cells are those of the highest entropy.
_base_ = './study_upernet_swin-n.py'
model = dict(decode_head=dict(type='mmdynsparse.SparseUPerHead', sparsity=dict(keep_ratio=0.5)))
