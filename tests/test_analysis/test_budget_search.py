import itertools
import json

import numpy as np
import pytest
from torch import nn

from mmdynsparse.analysis.budget_measures import Notes
from mmdynsparse.analysis.budget_search import (
    GRID,
    Group,
    Table,
    by_part,
    differences,
    evolve,
    find_groups,
    monotone,
    probe,
    repair,
)
from mmdynsparse.models.decider import Decider
from mmdynsparse.models.sparsity import CellSparsity, Sparsity

SWIN = [Group('backbone', 1), Group('backbone', 2), Group('decode_head', 1)]
VIT = [Group('backbone', 1), Group('backbone', 1, falls=True), Group('backbone', 1, falls=True)]
FOLLOWING = [Group('backbone', 1), Group('backbone', 1), Group('neck', 1, follows=True)]


@pytest.fixture(params=[SWIN, VIT, FOLLOWING], ids=['swin', 'vit', 'following'])
def table(request) -> Table:
    """Hand-made: everything kept costs 1.02, dropping costs loss, groups differ in both."""
    rng = np.random.default_rng(1)
    dropped = 1 - np.array(GRID)
    costs = -np.outer([0.3, 0.2, 0.25], dropped)
    costs[:, :-1] += 0.01
    losses = np.outer([0.1, 0.4, 0.2], dropped**2) * rng.uniform(0.9, 1.1, (3, len(GRID)))
    return Table(request.param, 1.02, costs, losses)


def model_of(**parts: Decider) -> nn.Module:
    model = nn.Module()
    for name, decider in parts.items():
        part = nn.Module()
        part.decider = decider
        setattr(model, name, part)
    return model


def test_groups_of_a_model():
    cfg = dict(keep_ratio=0.5, locations={1: (0, 1), 2: (0,), 3: (1,)}, follow=(2,))
    backbone = Sparsity.from_cfg(cfg, (2, 2, 2, 2))
    vit = Sparsity.from_cfg(dict(keep_ratio=0.5, locations={0: (1, 2)}), (4,))
    head = CellSparsity.from_cfg(dict(keep_ratio=0.5, predictor='backbone'))
    groups = find_groups(model_of(backbone=Decider(backbone), neck=Decider(head, 8)))
    sizes = [1, 2, 1]
    assert groups == [*(Group('backbone', n) for n in sizes), Group('neck', 1, follows=True)]
    ratios = by_part(groups, (1.0, 0.7, 0.5, 0.3))
    assert ratios == {'backbone': [1.0, 0.7, 0.7, 0.5], 'neck': [0.3]}
    backbone.resolve(ratios['backbone'])
    decider = Decider(vit, falling=True)
    assert find_groups(model_of(backbone=decider)) == VIT[:2]
    decider.set_keep_ratio(by_part(VIT[:2], repair(VIT[:2], [0.5, 0.8]))['backbone'])
    assert find_groups(model_of(backbone=Decider(None))) == []


def test_probes_change_one_group():
    assert probe(SWIN, 1, 0.3).tolist() == [1, 0.3, 1]
    assert probe(VIT, 1, 0.3).tolist() == [1, 0.3, 0.3]
    assert probe(FOLLOWING, 1, 0.3).tolist() == [1, 0.3, 1]
    assert probe(FOLLOWING, 2, 0.3).tolist() == [0.9, 0.9, 0.3]


def test_repair_keeps_what_a_model_accepts():
    assert repair(SWIN, [0.1, 0.93333, 1.2]).tolist() == [0.2, 0.9, 1]
    assert repair(VIT, [0.5, 0.71234, 0.3]).tolist() == [0.5, 0.5, 0.3]
    assert repair(FOLLOWING, [1, 0.5, 0.3]).tolist() == [1, 0.5, 1]
    assert repair(FOLLOWING, [0.7, 0.51234, 0.3]).tolist() == [0.7, 0.512, 0.3]


def test_costs_of_what_falls_add_up():
    own = np.array([[-0.3, -0.1, 0], [-0.2, -0.1, 0], [-0.4, -0.2, 0]])
    measured = 1 + np.cumsum(own[::-1], axis=0)[::-1]
    assert differences(VIT, measured) == pytest.approx(own)
    assert differences(SWIN, 1 + own) == pytest.approx(own)


def test_costs_are_made_monotone():
    rising = np.array([[-3.0, -2, -2, 1, 0]])
    assert (monotone(rising) == rising).all()
    noisy = np.array([[-3.0, -1, -2, 1, 0], [0, 0.2, 0.1, 0.3, 0]])
    repaired = monotone(noisy)
    assert (np.diff(repaired[:, :-1]) >= 0).all() and (repaired[:, -1] == 0).all()
    assert repaired[0].tolist() == [-3, -1.5, -1.5, 1, 0]


def test_best_ratios_of_a_price(table: Table):
    for price in (0, 0.01, 0.1, 0.3, 0.5, 0.7, 1, 1.5, 3, 100):
        values = {}
        for index in itertools.product(range(len(GRID)), repeat=3):
            ratios = [GRID[i] for i in index]
            rises = any(g.falls and ratios[i] > ratios[i - 1] for i, g in enumerate(table.groups))
            if not rises:
                rows = range(3), index
                values[tuple(ratios)] = (table.losses[rows] + price * table.costs[rows]).sum()
        expected = repair(table.groups, min(values, key=values.get))
        assert table.best(price).tolist() == expected.tolist()


@pytest.mark.parametrize('target', [0.5, 0.62, 0.8, 0.97, 1.02])
def test_ratios_are_brought_to_a_cost(table: Table, target: float):
    assert table.cost(table.cheap(target)) <= target
    for start in ([0.9, 0.5, 0.4], [0.3, 0.3, 0.3], table.cheap(target)):
        ratios = table.fit(start, target)
        assert (repair(table.groups, ratios) == ratios).all()
        assert ((ratios == 1) == (repair(table.groups, start) == 1)).all()
        assert table.cost(ratios) <= target
        if ratios[ratios < 1].max(initial=0) < 0.9 and len(set(ratios)) == 1:
            assert table.cost(ratios) == pytest.approx(target, abs=2e-3)
    same = set(table.uniform(target))
    assert len(same) == 1 and table.cost(table.uniform(target)) <= target
    assert (same == {1.0}) == (target == 1.02)


def test_a_cost_that_is_too_low(table: Table):
    assert table.fit([0.5, 0.5, 0.5], 0.4) is None
    assert table.fit([1, 1, 1], 1.0) is None
    for ratios in (table.uniform(0.4), table.cheap(0.4)):
        assert ratios.tolist() == [0.2] * 3


@pytest.mark.parametrize('target', [0.6, 0.8])
def test_search_is_no_worse_than_equal_ratios(table: Table, target: float):
    evaluated = []

    def loss(ratios):
        evaluated.append(tuple(ratios))
        # What the table does not know: together the first two cost more than each alone.
        own = [np.interp(r, GRID, row) for r, row in zip(ratios, table.losses, strict=True)]
        return sum(own) + (1 - ratios[0]) * (1 - ratios[1])

    found = evolve(table, target, loss, evaluations=40)
    assert len(evaluated) == len(set(evaluated)) == 40
    for ratios in evaluated:
        assert repair(table.groups, ratios).tolist() == list(ratios)
        assert table.cost(ratios) <= target
    starts = evaluated[:2]
    assert tuple(table.uniform(target)) == starts[0]
    assert loss(found) <= min(map(loss, map(np.array, starts)))
    assert loss(found) < loss(table.uniform(target))
    assert (evolve(table, target, loss, evaluations=40) == found).all()


def test_search_of_one_group_ends():
    table = Table([Group('backbone', 1)], 1.0, np.array([GRID]) - 1, 1 - np.array([GRID]))
    assert evolve(table, 0.7, lambda ratios: 1 - ratios[0], 50).tolist() == [0.7]
    assert evolve(table, 1.0, lambda ratios: 1 - ratios[0], 50).tolist() == [1]


def test_notes_are_resumed_under_the_same_key(tmp_path):
    path, counts = tmp_path / 'notes', []

    def measure(value):
        return lambda: counts.append(value) or value

    for _ in range(2):
        notes = Notes(path, 'one round')
        assert notes.get('a', measure(0.5)) == 0.5
        assert notes.get('b', measure([1.0, 2.0])) == [1.0, 2.0]
    assert counts == [0.5, [1.0, 2.0]]
    assert json.loads(path.read_text())['results'] == {'a': 0.5, 'b': [1.0, 2.0]}
    assert Notes(path, 'two rounds').get('a', measure(0.7)) == 0.7
