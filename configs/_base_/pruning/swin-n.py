# The published pruned Swin-T at half the width.
spvit_swin_n = dict(
    mixers=[['conv1', 'none'], ['conv1', 'none'], ['msa'] * 6, ['msa'] * 2],
    hidden=[[93, 76], [323, 252], [675, 660, 645, 625, 617, 541], [1521, 1497]],
)
