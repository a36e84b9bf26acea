"""tools/analysis_tools/search_budgets.py on tiny models."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint
from PIL import Image

from mmdynsparse.analysis import budget_measures as library
from mmdynsparse.analysis.flops import count_macs
from mmdynsparse.analysis.latency import Latency
from mmdynsparse.models.budgets import budgets

TOOL = 'analysis_tools/search_budgets.py'
SPARSE_HEAD = (
    "model['decode_head'].update(\n"
    "    type='mmdynsparse.SparseUPerHead', sparsity=dict(keep_ratio=0.5, cell_size=4))\n"
)
SPARSE_NECK = (
    "model['neck'].update(\n"
    "    type='mmdynsparse.SparseFPN',\n"
    "    sparsity=dict(keep_ratio=0.5, cell_size=4, predictor='backbone'))\n"
    "model['rpn_head'].update(type='mmdynsparse.SparseRPNHead', sparsity=dict())\n"
)
QUICK = ('--num-images', 2, '--evaluations', 4, '--rounds', 1)


@pytest.fixture
def run(load_tool: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable:
    """Runs the tool in this process and returns what it wrote and printed."""

    def call(*args: object) -> tuple[dict, str]:
        # Its handlers would write to the streams of an earlier test.
        MMLogger._instance_dict.clear()
        args = (*args, *QUICK, '--out', tmp_path / 'budgets.json')
        load_tool(TOOL).main([str(arg) for arg in args])
        assert sorted(p.name for p in tmp_path.glob('budgets*')) == ['budgets.json', 'budgets.png']
        return json.loads((tmp_path / 'budgets.json').read_text()), capsys.readouterr().out

    return call


@pytest.fixture
def macs_for_ms(monkeypatch: pytest.MonkeyPatch) -> list:
    """Takes multiply-adds for times, and returns a list of what was timed."""
    timed = []

    def compare(functions: dict, rounds: int, warmup: int) -> dict:
        timed.append(len(functions))
        return {name: Latency(count_macs(function), 0, 0) for name, function in functions.items()}

    monkeypatch.setattr(library, 'compare_latency', compare)
    return timed


def check(row: dict, share: float, kind: str) -> None:
    assert row[kind] <= share * 1.2
    assert 0 <= row['divergence'] <= row['uniform']['divergence']
    assert row['gmacs_p95'] == pytest.approx(row['gmacs'], rel=0.1)
    assert row['uniform']['latency'] > 0 and 0 < row['uniform']['gmacs'] <= 1


def test_segmentor(
    run: Callable, write_config: Callable, data_root: Path, tmp_path: Path, macs_for_ms: list
) -> None:
    config = write_config('seg', SPARSE_HEAD, name='sparse_head')
    args = (config, '--images', data_root / 'images/val', '--latency', 0.9, '--gmacs', '0.90', 1)
    result, output = run(*args)
    assert list(result['budgets']) == ['0.9', 'gmacs-0.9', 'gmacs-1']
    for name, row in result['budgets'].items():
        check(row, float(name.split('-')[-1]), 'gmacs' if '-' in name else 'latency')
        assert {part: len(r) for part, r in row['keep_ratios'].items()} == dict(
            backbone=1, decode_head=1
        )
        assert all(0.2 <= r <= 1 for ratios in row['keep_ratios'].values() for r in ratios)
    assert result['dense']['ms'] > 0 and result['dense']['gmacs'] > 0
    setting = result['setting']
    assert setting['images'] == 2 and setting['sizes'] == '64x64'
    assert setting['dense'] == 'mmseg.SwinTransformer, mmseg.UPerHead'
    assert 'equal ratios' in output and 'gmacs-0.9' in output
    assert Image.open(tmp_path / 'budgets.png').size[0] > 400


def test_detector(run: Callable, write_config: Callable, data_root: Path) -> None:
    config = write_config('det', SPARSE_NECK, name='sparse_neck')
    result, _ = run(config, '--images', data_root / 'images/val', '--gmacs', 0.85)
    check(result['budgets']['gmacs-0.85'], 0.85, 'gmacs')
    assert list(result['budgets']['gmacs-0.85']['keep_ratios']) == ['backbone', 'neck']


def test_metric(run: Callable, write_config: Callable) -> None:
    config = write_config('seg', SPARSE_HEAD, name='sparse_head')
    result, output = run(config, '--metric', 'mIoU', '--gmacs', 0.9)
    row = result['budgets']['gmacs-0.9']
    assert 'divergence' not in row and row['mIoU'] >= row['uniform']['mIoU'] >= 0
    assert 'mIoU' in output


def test_a_stopped_run_goes_on(
    run: Callable,
    write_config: Callable,
    data_root: Path,
    tmp_path: Path,
    macs_for_ms: list,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = (write_config('seg'), '--images', data_root / 'images/val', '--latency', 0.95)
    calls = []

    def evaluate(divergence: library.Divergence) -> float:
        calls.append(1)
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        return original(divergence)

    original, fails_at = library.Divergence.__call__, 5
    monkeypatch.setattr(library.Divergence, '__call__', evaluate)
    with pytest.raises(KeyboardInterrupt):
        run(*args)
    assert [path.name for path in tmp_path.iterdir()] == ['budgets.json.partial']
    assert macs_for_ms == [3, 10]  # both ends, then the table
    resumed = run(*args)[0]['budgets']
    assert set(macs_for_ms[2:]) == {2}
    in_two_runs, fails_at = len(calls), None
    calls.clear()
    assert run(*args)[0]['budgets'] == resumed
    assert len(calls) == in_two_runs - 1  # nothing but the one that failed was done twice


@pytest.mark.parametrize(
    ('args', 'expected'),
    [
        (('--latency', 0), "--latency: must be in (0, 1], got '0'"),
        (('--gmacs', 1.5), "--gmacs: must be in (0, 1], got '1.5'"),
        (('--latency', 'half'), "--latency: must be in (0, 1], got 'half'"),
        ((), '--latency or --gmacs must have at least one share, got none'),
        (('--latency', 0.5, '--evaluations', 0), "--evaluations: must be at least 1, got '0'"),
        (
            ('--latency', 0.5, '--out', 'budgets.txt'),
            "--out must be a .json file in an existing folder, got 'budgets.txt'",
        ),
        (
            ('--latency', 0.5, '--out', 'none/budgets.json'),
            "--out must be a .json file in an existing folder, got 'none/budgets.json'",
        ),
        (
            ('--latency', 0.5, '--images', 'none.jpg'),
            "--images must be existing files or folders, got 'none.jpg'",
        ),
        (
            ('--latency', 0.5, '--out-checkpoint', 'new'),
            '--out-checkpoint needs a checkpoint, got random weights',
        ),
        (('--gmacs', 0.5, '--metric', 'mIoU'), 'not allowed with argument --images'),
    ],
)
def test_bad_arguments(
    args: tuple, expected: str, fails: Callable, write_config: Callable, tmp_path: Path
) -> None:
    given = ('--images', Path(__file__).parent, '--out', tmp_path / 'budgets.json')
    assert expected in fails(TOOL, write_config('seg'), *given, *args)


def test_bad_models(
    fails: Callable, write_config: Callable, data_root: Path, tmp_path: Path
) -> None:
    args = ('--images', data_root / 'images/val', '--gmacs', 0.5, '--out', tmp_path / 'x.json')
    dense = "model['backbone']['type'] = 'SwinTransformer'\ndel model['backbone']['sparsity']\n"
    line = fails(TOOL, write_config('seg', dense, name='dense'), *args)
    assert 'config must have a sparse part' in line
    torch.save(dict(state_dict={'backbone.weight': torch.zeros(3)}), tmp_path / 'other.pth')
    line = fails(TOOL, write_config('seg'), tmp_path / 'other.pth', *args)
    assert "checkpoint must fit the config's model" in line


def test_budgets_that_no_model_has(
    fails: Callable, write_config: Callable, data_root: Path, tmp_path: Path
) -> None:
    out = tmp_path / 'budgets.json'
    out.write_text('{}')
    args = ('--images', data_root / 'images/val', *QUICK, '--out', out)
    line = fails(TOOL, write_config('seg'), *args, '--gmacs', 0.9, 0.01)
    assert '--gmacs must be at least 0.' in line and 'cheapest model' in line and 'got 0.01' in line
    assert out.read_text() == '{}'
    line = fails(TOOL, write_config('seg'), *args[2:], '--gmacs', 1, '--metric', 'AP')
    assert "--metric must be one of ('aAcc', 'mIoU', 'mAcc'), got 'AP'" in line


def test_everything_is_kept_if_it_costs_no_more(
    run: Callable, write_config: Callable, data_root: Path, tmp_path: Path
) -> None:
    config = write_config('seg')
    init_default_scope('mmseg')
    model = MODELS.build(Config.fromfile(config).model)
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    images = data_root / 'images/val'
    new = tmp_path / 'new.pth'
    args = (tmp_path / 'weights.pth', '--images', images, '--gmacs', 1, '--out-checkpoint', new)
    result, _ = run(config, *args)
    load_checkpoint(model, str(new))
    assert budgets(model) == {'gmacs-1': dict(backbone=[1.0])}
    row = result['budgets']['gmacs-1']
    assert row['keep_ratios'] == dict(backbone=[1.0]) and row['gmacs'] <= 1
    assert row['divergence'] == pytest.approx(0, abs=1e-6)
