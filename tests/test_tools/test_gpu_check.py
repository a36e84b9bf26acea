"""tools/gpu_check.py, whose steps run on a CPU too."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

FAILING = dict(step='executions', status='FAILED', seconds=0.0, summary='')


def run(load_tool: Callable, *args: object) -> None:
    load_tool('gpu_check.py').main([str(arg) for arg in args])


@pytest.mark.skipif(torch.cuda.is_available(), reason='checks what is said without CUDA')
def test_without_cuda(load_tool: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        run(load_tool, '--out', tmp_path)
    assert '--device cuda needs a CUDA device' in capsys.readouterr().err


def test_what_is_done_is_not_done_again(
    load_tool: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A step that failed is; one for which no time is left is named."""
    done = dict(FAILING, status='ok', summary='done before')
    (tmp_path / 'executions.json').write_text(json.dumps(done))
    (tmp_path / 'kernels.json').write_text(json.dumps(dict(FAILING, step='kernels')))
    steps = ('executions', 'kernels', 'synchronizations')
    args = ('--device', 'cpu', '--out', tmp_path, '--steps')
    run(load_tool, *args, *steps)
    results = json.loads((tmp_path / 'summary.json').read_text())['results']
    assert [result['status'] for result in results] == ['ok', 'skipped', 'skipped']
    output = capsys.readouterr().out
    assert 'done before' in output and 'Triton kernels need CUDA' in output
    tool = load_tool('gpu_check.py')
    assert tool.read('graphs', tmp_path)['status'] == 'missing'


def test_a_wrong_result_fails(load_tool: Callable, tmp_path: Path) -> None:
    tool = load_tool('gpu_check.py')
    x = torch.ones(3)
    assert tool.error([x], [x * 1.01]) == pytest.approx(0.0099, abs=1e-4)
    assert tool.error([x / 0], [x]) == float('inf')
    assert not tool.check(dict(a=0.0, b=0.01))['ok'] and tool.check(dict(a=0.0))['ok']
    tool.STEPS = dict(executions=lambda device, out: dict(ok=False, summary='wrong'))
    tool.run_step('executions', 'cpu', tmp_path)
    assert json.loads((tmp_path / 'executions.json').read_text())['status'] == 'FAILED'


@pytest.mark.slow
def test_every_step_on_a_cpu(load_tool: Callable, tmp_path: Path) -> None:
    run(load_tool, '--device', 'cpu', '--out', tmp_path, '--seconds', 3000)
    results = json.loads((tmp_path / 'summary.json').read_text())['results']
    skipped = [result['step'] for result in results if result['status'] == 'skipped']
    assert all('cudagraph' in step for step in skipped if 'latency' in step)
    assert {'kernels', 'synchronizations'} <= set(skipped)
    assert {result['status'] for result in results} == {'ok', 'skipped'}
