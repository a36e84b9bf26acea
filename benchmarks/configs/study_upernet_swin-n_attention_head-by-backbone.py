# The same with a sparse head that follows the backbone's predictors. It needs no training: --start
# a checkpoint fine-tuned without it.
_base_ = './study_upernet_swin-n_attention.py'
model = dict(
    decode_head=dict(
        type='mmdynsparse.SparseUPerHead', sparsity=dict(keep_ratio=0.3, predictor='backbone')
    )
)
