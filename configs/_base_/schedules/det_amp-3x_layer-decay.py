# ConvNeXt's optimizer: the learning rate falls towards the input, here by groups of blocks, and
# parameters of one dimension are not decayed. The constructor tells layers by names, so heads and
# predictors learn at the full rate and fast paths at that of their block.
_base_ = './det_3x.py'
optim_wrapper = dict(
    type='AmpOptimWrapper',
    constructor='LearningRateDecayOptimizerConstructor',
    paramwise_cfg=dict(_delete_=True, decay_rate=0.95, decay_type='layer_wise', num_layers=6),
)
