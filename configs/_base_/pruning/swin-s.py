# The published pruned Swin-S.
spvit_swin_s = dict(
    mixers=[
        ['conv1', 'none'],
        ['msa'] * 2,
        [*['msa'] * 12, 'none', 'conv1', 'msa', 'msa', 'none', 'none'],
        ['msa'] * 2,
    ],
    hidden=[
        [188, 209],
        [748, 680],
        [
            *(1159, 1260, 1127, 1036, 919, 916, 868, 918, 903),
            *(937, 961, 1037, 1063, 996, 888, 866, 741, 509),
        ],
        [3064, 3051],
    ],
    norm_identity=True,
)
