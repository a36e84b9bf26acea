"""Decisions about regions."""

import pytest
import torch

from mmdynsparse.models.decider import Decider
from mmdynsparse.models.regions import decide_regions
from mmdynsparse.models.sparsity import RegionSparsity


def decide(scores, **sparsity):
    decider = Decider(RegionSparsity.from_cfg(sparsity))
    return decide_regions(decider, [torch.tensor(s) for s in scores]).mask.tolist()


def test_each_image_by_itself():
    mask = decide([[0.1, 0.9, 0.5, 0.2], [], [0.3, 0.4]], keep_ratio=0.5)
    assert mask == [[0, 1, 1, 0, 0, 1]]


def test_the_best_is_always_kept():
    assert decide([[0.1, 0.9], [0.0]], keep_ratio=0.3) == [[0, 1, 1]]


def test_mass_keeps_the_fewest_that_hold_a_share():
    mass = dict(type='mass', least=0.25, most=0.75)
    assert decide([[0.9, 0.05, 0.03, 0.02]], keep_ratio=0.9, selector='mass') == [[1, 0, 0, 0]]
    assert decide([[0.9, 0.9, 0.9, 0.9]], keep_ratio=0.9, selector=mass) == [[1, 1, 1, 0]]


@pytest.mark.parametrize('selector', ['topk', 'mass', 'value', 'threshold', 'random'])
def test_no_regions(selector):
    assert decide([[], []], keep_ratio=0.5, selector=selector) == [[]]
    assert decide([[0.5], []], keep_ratio=0.5, selector=selector) == [[1]]


def test_everything():
    assert decide([[0.1], [0.2, 0.0]], keep_ratio=1.0) == [[1, 1, 1]]


@pytest.mark.parametrize(
    ('sparsity', 'message'),
    [
        (dict(keep_ratio=0), 'keep_ratio must be a number in'),
        (dict(keep_ratio=0.5, cell_size=8), 'takes the keys'),
        (dict(selector='topk'), 'needs keep_ratio'),
        (dict(keep_ratio=0.5, selector='best'), 'selector must be one of'),
        ([0.5], 'must be None or a dict'),
    ],
)
def test_bad_arguments(sparsity, message):
    with pytest.raises(ValueError, match=message):
        RegionSparsity.from_cfg(sparsity)
