# ConvNeXt's optimizer: the learning rate falls towards the input, here by stages, and parameters
# of one dimension are not decayed. The constructor tells stages by names, so heads and predictors
# learn at the full rate and fast paths at that of their block.
_base_ = './seg_160k.py'
optim_wrapper = dict(
    type='AmpOptimWrapper',
    constructor='LearningRateDecayOptimizerConstructor',
    paramwise_cfg=dict(_delete_=True, decay_rate=0.9, decay_type='stage_wise', num_layers=6),
    optimizer=dict(lr=1e-4, weight_decay=0.05),
    loss_scale='dynamic',
)
