# Search on a CPU, from a dense model: --cfg-options load_from=DENSE_CHECKPOINT
_base_ = './spvit-vit-n_mln_upernet_1xb8-finetune-400_camvid-256x256.py'
model = dict(
    backbone=dict(
        type='mmdynsparse.SparseVisionTransformer', pruning=dict(_delete_=True, search=True)
    )
)
optim_wrapper = dict(constructor='mmdynsparse.FineTuneOptimWrapperConstructor')
custom_hooks = [
    dict(type='mmdynsparse.SinglePathSearchHook', target=0.75, gate_lr=5e-2, interval=10)
]
