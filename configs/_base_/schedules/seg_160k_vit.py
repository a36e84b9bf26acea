# Swin's optimizer with the names of a plain ViT's embeddings.
_base_ = './seg_160k.py'
optim_wrapper = dict(
    paramwise_cfg=dict(
        _delete_=True,
        custom_keys={
            'pos_embed': dict(decay_mult=0.0),
            'cls_token': dict(decay_mult=0.0),
            'norm': dict(decay_mult=0.0),
        },
    )
)
