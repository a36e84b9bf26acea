# Search on a CPU, from a dense model: --cfg-options load_from=DENSE_CHECKPOINT
_base_ = './mask-rcnn_spvit-swin-n_fpn_1xb2-finetune-400_camvid.py'
model = dict(
    backbone=dict(
        type='mmdynsparse.SparseSwinTransformer', pruning=dict(_delete_=True, search=True)
    )
)
optim_wrapper = dict(constructor='mmdynsparse.FineTuneOptimWrapperConstructor')
custom_hooks = [
    dict(
        type='mmdynsparse.SinglePathSearchHook',
        target=0.75,
        gate_lr=5e-2,
        interval=10,
        shape=(360, 480),
    )
]
