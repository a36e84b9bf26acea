# A base beside a dense config of 2000 iterations: param_scheduler = _base_.scheduler_400
scheduler_400 = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=20),
    dict(type='PolyLR', eta_min=1e-6, power=1.0, by_epoch=False, begin=20, end=400),
]
