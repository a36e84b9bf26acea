# Swin's optimizer. Norms and position biases are not decayed; predictors and fast paths learn at
# the full rate like everything else. Learning rate and weight decay belong to the schedule.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', betas=(0.9, 0.999)),
    paramwise_cfg=dict(
        custom_keys={
            'absolute_pos_embed': dict(decay_mult=0.0),
            'relative_position_bias_table': dict(decay_mult=0.0),
            'norm': dict(decay_mult=0.0),
        }
    ),
)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
