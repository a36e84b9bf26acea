import pytest
from mmengine.config import ConfigDict

from mmdynsparse.models.sparsity import CellSparsity, Sparsity, default_locations

DEPTHS = (2, 2, 6, 2)
STAGES = {0: (0,), 1: (0,), 2: (1, 3), 3: (0,)}


def ratios(**cfg):
    sparsity = Sparsity.from_cfg(cfg, DEPTHS)
    return sparsity.resolve(sparsity.keep_ratio)


@pytest.mark.parametrize(
    'depths, expected',
    [
        ((2, 2, 6, 2), {2: (1, 2, 3)}),
        ((2, 2, 18, 2), {2: (2, 4, 6)}),
        ((3, 3, 27, 3), {2: (3, 6, 9)}),
        ((2, 1), {1: (0,)}),
    ],
)
def test_default_locations_are_the_published_ones(depths, expected):
    assert default_locations(depths) == expected


def test_schedules():
    assert ratios(keep_ratio=0.7) == [0.7, 0.5, 0.3]
    assert ratios(keep_ratio=0.7, schedule='power') == [0.7, 0.49, 0.343]
    assert ratios(keep_ratio=[0.9, 0.2, 1]) == [0.9, 0.2, 1.0]
    assert ratios(keep_ratio=1) == ratios(keep_ratio=1.0, schedule='power') == [1.0] * 3


def test_the_schedule_starts_anew_in_every_stage():
    locations = {2: (0, 2), 0: (1,)}
    assert ratios(keep_ratio=0.6, locations=locations) == [0.6, 0.6, 0.4]


def test_a_stage_that_follows_has_the_ratio_of_the_decision_before():
    cfg = dict(locations=STAGES, follow=(1, 3))
    assert ratios(keep_ratio=0.7, **cfg) == [0.7, 0.7, 0.7, 0.5, 0.5]
    assert ratios(keep_ratio=[0.6, 0.6, 0.9, 0.2, 0.2], **cfg) == [0.6, 0.6, 0.9, 0.2, 0.2]
    assert ratios(keep_ratio=1, **cfg) == [1.0] * 5


@pytest.mark.parametrize('selector', ['value', dict(type='mass', least=0.1), dict(type='value')])
def test_selectors_may_have_arguments(selector):
    cfg = ConfigDict(keep_ratio=0.5, selector=selector)
    assert Sparsity.from_cfg(cfg, DEPTHS).selector == selector
    assert CellSparsity.from_cfg(cfg).selector == selector


def test_config_dicts_and_string_stages():
    cfg = ConfigDict(keep_ratio=0.5, locations={'2': [1, 3]})
    assert Sparsity.from_cfg(cfg, DEPTHS).locations == {2: (1, 3)}


@pytest.mark.parametrize(
    'cfg, message',
    [
        (dict(keep_ratio=0), r'keep_ratio must be a number in \(0, 1\], got 0'),
        (dict(keep_ratio=1.2), r'\(0, 1\], got 1.2'),
        (dict(keep_ratio=float('nan')), r'\(0, 1\], got nan'),
        (dict(keep_ratio='0.7'), r"\(0, 1\], got '0.7'"),
        (dict(keep_ratio=[0.7, -0.1, 0.3]), r'keep_ratio of decision 1 .*\(0, 1\], got -0.1'),
        (dict(keep_ratio=[0.7, 0.5]), 'a list of 3 values, one for each decision, got 2'),
        (dict(keep_ratio=0.3), r"decision 2 .*got -0.1 \(keep_ratio 0.3 with schedule 'subtract'"),
        (dict(keep_ratio=0.7, schedule='linear'), r"one of \('subtract', 'power'\), got 'linear'"),
        (dict(keep_ratio=0.7, selector='best'), r"one of \('topk', .*got 'best'"),
        (dict(keep_ratio=0.7, selector=dict(least=0.1)), r'takes type .*, got .*least'),
        (dict(keep_ratio=0.7, selector=dict(type='mass', share=1)), r'takes type .*, got .*share'),
        (
            dict(keep_ratio=0.7, selector=dict(type='topk')),
            r"selector.type must be one of \('mass', 'value'\), got 'topk'",
        ),
        (
            dict(keep_ratio=0.7, selector=dict(type='mass', least=0.5, most=0.4)),
            'selector must have 0 <= least <= most <= 1 .*, got .*0.4',
        ),
        (dict(keep_ratio=0.7, selector=dict(type='value', most=0)), 'most > 0, got .*most'),
        (dict(keep_ratio=0.7, selector=dict(type='value', least='0')), 'got .*least'),
        (dict(keep_ratio=0.7, locations={2: (1, 6)}), r'indices 0 to 5, got \(1, 6\)'),
        (dict(keep_ratio=0.7, locations={2: (3, 1)}), r'ascending .* got \(3, 1\)'),
        (dict(keep_ratio=0.7, locations={2: ()}), r'got \(\)'),
        (dict(keep_ratio=0.7, locations={4: (0,)}), 'stages 0 to 3, got stage 4'),
        (dict(keep_ratio=0.7, locations={}), 'at least one stage, got none'),
        (dict(keep_ratio=0.7, ratio=0.3), r"takes the keys .*, got \['ratio'\]"),
        (dict(selector='topk'), 'needs keep_ratio'),
        (dict(keep_ratio=0.7, cell_size=(7, 7, 7)), 'at least 1 in each of 4 stages, got'),
        (dict(keep_ratio=0.7, cell_size=(7, 7, 7, 0)), r'cell_size .* got \(7, 7, 7, 0\)'),
        (dict(keep_ratio=0.7, cell_size=7), 'at least 1 in each of 4 stages, got 7'),
        (dict(keep_ratio=0.7, follow=(3,)), r'follow takes .* the first of them, \(\), got \(3,\)'),
        (dict(keep_ratio=0.7, follow=2), r'got 2'),
        (dict(keep_ratio=0.7, locations=STAGES, follow=(0,)), r'\(1, 2, 3\), got \(0,\)'),
        (dict(keep_ratio=0.7, locations=STAGES, follow=(2,)), r'one block .* got \(1, 3\)'),
        (
            dict(keep_ratio=[0.7, 0.5, 0.7, 0.5, 0.5], locations=STAGES, follow=(1, 3)),
            'decision 1, which follows the one before it, must be 0.7, got 0.5',
        ),
        (dict(keep_ratio=0.7, attention='yes'), "must be True or False, got 'yes'"),
        (0.7, r"sparsity must be None or a dict with the keys \('keep_ratio', .*, got 0.7"),
        ([0.7], r'sparsity must be None or a dict .*, got \[0.7\]'),
        (dict(keep_ratio=0.7, locations=[1, 2]), r'locations must be a dict .* got \[1, 2\]'),
        (dict(keep_ratio=0.7, locations={2: 1}), r'locations\[2\] takes a list .* 0 to 5, got 1'),
        (dict(keep_ratio=0.7, locations={'two': (1,)}), "stages 0 to 3, got stage 'two'"),
        (dict(keep_ratio=0.7, locations={2: '1'}), r"locations\[2\] takes a list .* got '1'"),
        (dict(keep_ratio=0.7, predictor=None), r'predictor must be a config .*, got None'),
        (dict(keep_ratio=0.7, predictor=dict(eps=1)), r"predictor must be .*, got \{'eps': 1\}"),
        (
            dict(keep_ratio=0.7, fast_path='LinearFastPath'),
            "fast_path must be None or a config .*, got 'LinearFastPath'",
        ),
        (dict(keep_ratio=0.7, selector=['topk']), r"selector must be one of .*, got \['topk'\]"),
        (dict(keep_ratio=None), r'keep_ratio must be a number in \(0, 1\], got None'),
        (dict(keep_ratio=0.7, cell_size={0: 1}), r'cell_size must be .*, got \{0: 1\}'),
    ],
)
def test_bad_values_name_argument_range_and_value(cfg, message):
    with pytest.raises(ValueError, match=message):
        Sparsity.from_cfg(cfg, DEPTHS)


@pytest.mark.parametrize(
    'cfg, message',
    [
        (0.5, r"sparsity must be None or a dict with the keys \('keep_ratio', .*, got 0.5"),
        ([0.5], r'sparsity must be None or a dict .*, got \[0.5\]'),
        (dict(keep_ratio=[0.5, 0.5]), r'keep_ratio must be a number in \(0, 1\], got \[0.5, 0.5\]'),
        (dict(keep_ratio=0.5, predictor=3), "predictor must be a config or 'backbone', got 3"),
        (dict(keep_ratio=0.5, predictor={}), r"a config or 'backbone', got \{\}"),
        (dict(keep_ratio=0.5, cell_size='8'), "cell_size must be an even number .*, got '8'"),
    ],
)
def test_bad_values_of_necks_and_heads(cfg, message):
    with pytest.raises(ValueError, match=message):
        CellSparsity.from_cfg(cfg)
