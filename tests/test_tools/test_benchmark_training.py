"""tools/analysis_tools/benchmark_training.py on tiny models."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

TOOL = 'analysis_tools/benchmark_training.py'


@pytest.mark.parametrize('task', ['seg', 'det'])
def test_training(
    task: str,
    load_tool: Callable,
    write_config: Callable,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    args = (write_config(task), '--rounds', 2, '--warmup', 0, '--out', tmp_path)
    load_tool(TOOL).main([str(arg) for arg in args])
    result = json.loads((tmp_path / 'training.json').read_text())
    names = ['dense', 'sparse', 'dense forward', 'teacher']
    assert [row['model'] for row in result['rows']] == names
    dense = result['rows'][0]
    assert dense['ratio'] == 1
    for row in result['rows']:
        assert 0 < row['p10'] <= row['median'] <= row['p90']
        assert row['ratio'] == pytest.approx(row['median'] / dense['median'])
    assert result['setting']['batch'] == 2
    assert 'SwinTransformer' in result['setting']['dense']
    assert 'ratio to dense' in capsys.readouterr().out


def test_bad_input(fails: Callable, write_config: Callable) -> None:
    line = fails(TOOL, write_config('seg'), '--batch-size', 9)
    assert 'train_dataloader.dataset must hold at least 9 images, got 4' in line
    assert 'must be at least 1' in fails(TOOL, write_config('seg'), '--batch-size', 0)
