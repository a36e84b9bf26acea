"""Budgets of models: their files, their way through checkpoints, and what does not fit."""

import json

import pytest
import torch
from mmengine.runner import load_checkpoint, save_checkpoint

import mmdynsparse
from mmdynsparse.models import SparseSwinTransformer
from mmdynsparse.models.budgets import add_budgets, budgets, read_budgets, set_budget
from mmdynsparse.models.decider import Decider
from mmdynsparse.models.sparsity import CellSparsity

TABLE = {
    '0.8': {'backbone': [0.9, 0.8, 0.8], 'head': [0.7]},
    '0.6': {'backbone': [0.7, 0.4, 0.3], 'head': [0.3]},
}


class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.decider = Decider(CellSparsity.from_cfg(dict(keep_ratio=0.5)))


class Model(torch.nn.Module):
    def __init__(self, tiny_swin):
        super().__init__()
        self.backbone = SparseSwinTransformer(**tiny_swin, sparsity=dict(keep_ratio=0.7))
        self.head = Head()

    def ratios(self):
        return self.backbone.keep_ratios, self.head.decider.keep_ratios


@pytest.fixture
def file(tmp_path):
    path = tmp_path / 'budgets.json'
    rows = {name: dict(keep_ratios=ratios, latency=0.5) for name, ratios in TABLE.items()}
    path.write_text(json.dumps(dict(budgets=rows)))
    return path


def test_a_budget_of_a_file(tiny_swin, file):
    model = Model(tiny_swin)
    mmdynsparse.set_budget(model, f'{file}:0.6')
    assert model.ratios() == ([0.7, 0.4, 0.3], [0.3])
    set_budget(model, 0.8)
    assert model.ratios() == ([0.9, 0.8, 0.8], [0.7])
    for everything in (1.0, 1, '1', '1.0'):
        set_budget(model, 0.8)
        set_budget(model, everything)
        assert model.ratios() == ([1.0] * 3, [1.0])
    add_budgets(model, {'1': TABLE['0.8']})  # a search that was asked for 1 names its budget so
    set_budget(model, 1.0)
    assert model.ratios() == ([0.9, 0.8, 0.8], [0.7])


def test_budgets_travel_with_checkpoints(tiny_swin, tmp_path):
    """As those of the runner, which ``init_model`` of mmseg and mmdet loads."""
    model = Model(tiny_swin)
    add_budgets(model, TABLE)
    save_checkpoint(dict(state_dict=model.state_dict(), meta={}), str(tmp_path / 'x.pth'))
    loaded = Model(tiny_swin)
    assert budgets(loaded) == {}
    load_checkpoint(loaded, str(tmp_path / 'x.pth'))
    assert budgets(loaded) == TABLE
    set_budget(loaded, '0.6')
    assert loaded.ratios() == ([0.7, 0.4, 0.3], [0.3])
    # Weights without budgets leave those alone that the model has.
    loaded.load_state_dict(Model(tiny_swin).state_dict())
    assert budgets(loaded) == TABLE


def test_names_of_the_state_dict_are_those_without_budgets(tiny_swin):
    model = Model(tiny_swin)
    before = list(model.state_dict())
    add_budgets(model, TABLE)
    assert list(model.state_dict()) == before


@pytest.mark.parametrize(
    'table, message',
    [
        ({'0.5': {'backbone': [0.5] * 3}}, r"parts \['backbone', 'head'\], got \['backbone'\]"),
        ({'0.5': {'backbone': [0.5] * 2, 'head': [0.5]}}, 'does not fit backbone: .* 3 values'),
        ({'0.5': {'backbone': [0.5] * 3, 'head': [0]}}, r'does not fit head: .*\(0, 1\], got 0'),
    ],
)
def test_a_table_of_another_architecture_changes_nothing(table, message, tiny_swin):
    model = Model(tiny_swin)
    with pytest.raises(ValueError, match=message):
        add_budgets(model, {**TABLE, **table})
    assert budgets(model) == {}


def test_unknown_budgets(tiny_swin, file):
    model = Model(tiny_swin)
    with pytest.raises(ValueError, match=r'none: name a file of search_budgets\.py'):
        set_budget(model, 0.6)
    with pytest.raises(ValueError, match=r'that the model has \(0.8, 0.6\), got 0.7'):
        set_budget(model, f'{file}:0.7')
    assert model.ratios() == ([0.7, 0.5, 0.3], [0.5])
    with pytest.raises(ValueError, match='needs a model with a sparse part, got a Linear'):
        set_budget(torch.nn.Linear(1, 1), 1.0)


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match='existing file before the colon'):
        read_budgets(tmp_path / 'none.json')
    bad = tmp_path / 'bad.json'
    for text in ('no json', '[]', '{"budgets": {"0.5": {}}}', '{"budgets": {"0.5": 1}}'):
        bad.write_text(text)
        with pytest.raises(ValueError, match=r'file of search_budgets\.py, got'):
            read_budgets(bad)
