# The same with a sparse head that follows the backbone's predictors.
_base_ = './study_upernet_swin-n_attention_sparse-head.py'
model = dict(decode_head=dict(sparsity=dict(predictor='backbone')))
