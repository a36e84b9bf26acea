import pytest
from mmengine.config import ConfigDict

from mmdynsparse.models import SparseLVViT, SparseSwinTransformer, SparseVisionTransformer
from mmdynsparse.models.pruning import Pruning

DEPTHS, WIDTHS = (1, 2), (8, 16)
MIXERS = [['none'], ['conv1', 'msa']]


def test_what_is_not_given_is_as_in_the_dense_model():
    assert Pruning.from_cfg(dict(mixers=MIXERS), DEPTHS, WIDTHS).hidden == ((8,), (16, 16))
    pruning = Pruning.from_cfg(ConfigDict(hidden=[[3], [0, 16]]), DEPTHS, WIDTHS)
    assert pruning.mixers == (('msa',), ('msa', 'msa'))
    assert pruning.block(1, 0)[:2] == ('msa', 0)


def test_one_stage_may_be_one_list():
    for hidden in ([1, 2], [[1, 2]]):
        assert Pruning.from_cfg(dict(hidden=hidden), (2,), (4,)).hidden == ((1, 2),)


@pytest.mark.parametrize(
    'cfg, message',
    [
        (0.7, r'pruning must be None or a dict with the keys .*, got 0.7'),
        (dict(search=True, ratio=1), r"pruning takes the keys .*, got \['ratio'\]"),
        (dict(), 'either search=True or mixers and hidden, got'),
        (dict(search=True, mixers=MIXERS), 'either search=True or mixers and hidden, got'),
        (dict(search=1), 'pruning.search must be True or False, got 1'),
        (dict(search=True, alpha=0), 'pruning.alpha must be above 0, got 0'),
        (dict(search=True, alpha='1'), "pruning.alpha must be a number, got '1'"),
        (dict(search=True, init=float('nan')), 'pruning.init must be a number, got nan'),
        (dict(search=True, norm_identity=True), 'must be False with search=True, got True'),
        (dict(mixers=MIXERS, norm_cfg='BN'), "pruning.norm_cfg must be a config .*, got 'BN'"),
        (
            dict(mixers=[['none'], ['conv5', 'msa']]),
            r"pruning.mixers\[1\]\[0\] must be one of \('none', .*\), got 'conv5'",
        ),
        (dict(mixers=[['msa']]), r'pruning.mixers must .* of \[1, 2\] blocks, got \[1\]'),
        (dict(mixers=[['msa'], ['msa']]), r'of \[1, 2\] blocks, got \[1, 1\]'),
        (dict(mixers='msa'), r"of \[1, 2\] blocks, got 'msa'"),
        (dict(hidden=[[8], [16]]), r'pruning.hidden must .* of \[1, 2\] blocks, got \[1, 1\]'),
        (dict(hidden=[[8], [16, 17]]), r'hidden\[1\]\[1\] must be .* 0 to 16, .* got 17'),
        (dict(hidden=[[-1], [16, 16]]), r'hidden\[0\]\[0\] must be .* 0 to 8, .* got -1'),
        (dict(hidden=[[0.5], [16, 16]]), 'must be a whole number from 0 to 8, .* got 0.5'),
    ],
)
def test_bad_values(cfg, message):
    with pytest.raises(ValueError, match=message):
        Pruning.from_cfg(cfg, DEPTHS, WIDTHS)


@pytest.mark.parametrize('kind', [SparseSwinTransformer, SparseVisionTransformer])
def test_a_search_is_not_sparse(kind):
    with pytest.raises(ValueError, match=r'must be None with pruning\.search=True'):
        kind(pruning=dict(search=True), sparsity=dict(keep_ratio=0.7))


def test_families_that_cannot_be_pruned():
    with pytest.raises(ValueError, match='pruning must be None in a SparseLVViT, got'):
        SparseLVViT(pruning=dict(search=True))
    with pytest.raises(ValueError, match='num_fcs must be 2 with pruning, got 3'):
        SparseVisionTransformer(num_layers=2, pruning=dict(hidden=[1, 2]), num_fcs=3)


def test_an_attention_that_is_read_stays():
    predictor = dict(type='mmdynsparse.AttentionScore')
    with pytest.raises(ValueError, match=r"must be 'msa' in the layers \[0\], .*got \['conv1'\]"):
        SparseVisionTransformer(
            embed_dims=16,
            num_heads=2,
            num_layers=2,
            pruning=dict(mixers=['conv1', 'msa']),
            sparsity=dict(keep_ratio=0.5, locations={0: (1,)}, predictor=predictor),
        )
