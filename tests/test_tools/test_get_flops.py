"""tools/analysis_tools/get_flops.py on tiny models."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from torch.utils.flop_counter import FlopCounterMode

from mmdynsparse.analysis.architecture import architecture_macs
from mmdynsparse.analysis.dense import build_pair
from mmdynsparse.analysis.flops import CostMeter
from mmdynsparse.analysis.images import dataset_batches

TOOL = 'analysis_tools/get_flops.py'


@pytest.fixture
def run(load_tool: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable:
    """Runs the tool in this process and returns what it wrote and printed."""

    def call(*args: object) -> tuple[dict, str]:
        # Its handlers would write to the streams of an earlier test.
        MMLogger._instance_dict.clear()
        load_tool(TOOL).main([str(arg) for arg in (*args, '--out', tmp_path / 'new')])
        return json.loads((tmp_path / 'new/flops.json').read_text()), capsys.readouterr().out

    return call


@pytest.mark.parametrize('task', ['seg', 'det'])
@pytest.mark.parametrize('selector', ['topk', 'mass'])
def test_totals_over_the_test_set(
    task: str, selector: str, run: Callable, write_config: Callable
) -> None:
    extra = f"model['backbone']['sparsity']['selector'] = {selector!r}\n"
    config = write_config(task, extra, name=f'{task}-{selector}')
    result, output = run(config, '--depth', 1)
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    pair = build_pair(cfg.model)
    batches = list(dataset_batches(cfg, 20))
    assert result['images'] == len(batches) == 2
    whole, *parts = result['modules']
    for name in ('dense', 'sparse'):
        model = getattr(pair, name)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            for data in batches:
                model.test_step(data)
        expected = counter.get_total_flops() / 2 / len(batches) / 1e9
        assert whole[name]['gmacs'] == pytest.approx(expected, rel=0.01)
        assert sum(part[name]['gmacs'] for part in parts) == pytest.approx(expected)
        total = sum(p.numel() for p in model.parameters())
        assert 0.5 * total < whole[name]['params'] <= total
    assert whole['sparse']['gmacs'] < whole['dense']['gmacs']
    assert parts[0]['name'] == 'backbone'
    (rate,) = result['keep_rates']
    assert rate['target'] == 0.5
    if selector == 'topk':
        assert rate['measured'] == pytest.approx(0.5)
    assert 'test set of the config' in output and 'predictor 0' in output


def test_files_and_noise(run: Callable, write_config: Callable, data_root: Path) -> None:
    config, folder = write_config('seg'), data_root / 'images/train'
    result, _ = run(config, '--images', folder, folder / '0.jpg')
    assert result['images'] == 5
    result, output = run(config, '--images', folder, '--num-images', 2, '--depth', 3)
    assert result['images'] == 2
    assert 'backbone.stages.2' in output and 'backbone.stages.2.blocks' not in output
    small, _ = run(config, '--size', '64x32', '--num-images', 1)
    large, _ = run(config, '--size', '64', '--num-images', 1)
    gmacs = [r['modules'][1]['sparse']['gmacs'] for r in (small, large)]
    assert gmacs[1] == pytest.approx(2 * gmacs[0], rel=0.3)


def test_images_before_a_failure_are_written(
    fails: Callable, write_config: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_at_second(meter: CostMeter, function: Callable) -> None:
        if meter.calls == 1:
            raise KeyboardInterrupt
        run(meter, function)

    run = CostMeter.run
    monkeypatch.setattr(CostMeter, 'run', fail_at_second)
    line = fails(TOOL, write_config('seg'), '--size', 64, '--out', tmp_path)
    assert 'stopped by KeyboardInterrupt; measured before: 1 images' in line
    result = json.loads((tmp_path / 'flops.json').read_text())
    assert result['images'] == 1 and result['modules'][0]['sparse']['gmacs'] > 0
    assert 'fail_at_second' in result['error']


@pytest.mark.parametrize(
    ('args', 'expected'),
    [
        (('--num-images', 0), "--num-images: must be at least 1, got '0'"),
        (('--depth', 0), "--depth: must be at least 1, got '0'"),
        (('--size', '2x64'), 'at least one patch of the backbone, 4 px, got 2x64'),
        (('--images', 'none.jpg'), "--images must be existing files or folders, got 'none.jpg'"),
        (('--images', 'x.jpg', '--size', 64), 'not allowed with argument --images'),
        (
            ('--cfg-options', 'test_dataloader.dataset.data_root=none'),
            "test_dataloader.dataset.data_root must be an existing folder, got 'none'",
        ),
    ],
)
def test_bad_arguments(args: tuple, expected: str, fails: Callable, write_config: Callable) -> None:
    assert expected in fails(TOOL, write_config('seg'), *args)


def test_no_images(fails: Callable, write_config: Callable, tmp_path: Path) -> None:
    line = fails(TOOL, write_config('seg'), '--images', tmp_path)
    assert '--images must hold images' in line and str(tmp_path) in line
    config = write_config('seg', 'del test_dataloader\n', name='no_test')
    assert 'config must have a test_dataloader' in fails(TOOL, config)
    line = fails(TOOL, config, '--images', Path(__file__))
    assert '--images needs test_dataloader.dataset.pipeline' in line


PRUNING = """
model['backbone']['pruning'] = dict(
    mixers=[['conv1'], ['none'], ['msa', 'conv3'], ['msa']], hidden=[[20], [0], [192, 60], [100]])
"""


@pytest.mark.parametrize('sparse', [False, True])
def test_pruned_models(sparse: bool, run: Callable, write_config: Callable) -> None:
    """Both costs of the backbone are those of the closed form."""
    extra = PRUNING if sparse else f"{PRUNING}model['backbone']['sparsity'] = None\n"
    config = write_config('seg', extra, name=f'pruned-{sparse}')
    result, _ = run(config, '--size', '224', '--num-images', 1, '--depth', 1)
    (row,) = [row for row in result['modules'] if row['name'] == 'backbone']
    backbone = Config.fromfile(config).model.backbone
    pruned = architecture_macs(dict(backbone, sparsity=None), (224, 224)) / 1e9
    dense = architecture_macs(dict(backbone, sparsity=None, pruning=None), (224, 224)) / 1e9
    assert row['dense']['gmacs'] == pytest.approx(dense, rel=1e-3)
    assert row['dense']['params'] > row['sparse']['params']
    # The FFN that is sparse has 60 hidden units, and a predictor decides for it.
    assert row['sparse']['gmacs'] == pytest.approx(pruned, rel=0.05 if sparse else 1e-3)
    assert bool(result['keep_rates']) == sparse
