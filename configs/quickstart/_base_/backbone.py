# Swin cut down to what a CPU trains in minutes: a third of Swin-T's width, the same depths.
model = dict(
    backbone=dict(
        type='SwinTransformer',
        embed_dims=32,
        depths=(2, 2, 6, 2),
        num_heads=(1, 2, 4, 8),
        window_size=7,
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.0,
    )
)
