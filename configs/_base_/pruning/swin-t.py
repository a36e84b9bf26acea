# The published pruned Swin-T.
spvit_swin_t = dict(
    mixers=[['conv1', 'none'], ['conv1', 'none'], ['msa'] * 6, ['msa'] * 2],
    hidden=[[186, 152], [646, 504], [1350, 1319, 1289, 1249, 1234, 1082], [3041, 2994]],
    norm_identity=True,
)
