"""The benchmark of the kernels, as far as it runs without a GPU."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[3] / 'benchmarks/gpu_kernels.py'


@pytest.fixture(scope='module')
def benchmark():
    spec = importlib.util.spec_from_file_location('gpu_kernels', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cases(benchmark, interpreted):
    mlp = benchmark.mlp_case(20, 16, 0.7, torch.float32, 'cpu')
    return mlp, benchmark.conv_case(1, 16, 8, 4, 0.5, torch.float32, 'cpu')


def test_forms_agree(benchmark, cases):
    for case in cases:
        assert benchmark.error(case) < 1e-5


def test_a_wrong_kernel_is_seen(benchmark, cases):
    for case in cases:
        assert benchmark.error(case._replace(triton=lambda case=case: 1.1 * case.torch())) > 0.05


def test_dense_is_what_the_sparse_op_approaches(benchmark, interpreted):
    case = benchmark.mlp_case(20, 16, 1.0, torch.float32, 'cpu')
    torch.testing.assert_close(case.triton(), case.dense(), atol=1e-5, rtol=0)
    case = benchmark.conv_case(1, 16, 8, 8, 1.0, torch.float32, 'cpu')
    torch.testing.assert_close(case.triton(), case.dense(), atol=1e-5, rtol=0)


def test_table_json_and_verdict(benchmark, monkeypatch, cases, tmp_path, capsys):
    """Only the device is replaced: its name, and the graphs by plain calls."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'none')
    monkeypatch.setattr(benchmark, 'replay_of', lambda function: function)
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', True)  # put back afterwards
    monkeypatch.setattr(benchmark, 'RATIOS', (0.5,))
    mlp, conv = cases
    monkeypatch.setattr(benchmark, 'mlp_case', lambda *args: mlp)
    monkeypatch.setattr(benchmark, 'conv_case', lambda *args: conv)
    out = tmp_path / 'new' / 'result.json'
    command = ['--dtype', 'fp32', '--rounds', '1', '--out', str(out)]
    benchmark.main(command)
    rows = json.loads(out.read_text())['rows']
    assert len(rows) == 4
    assert all(min(row['dense'], row['torch'], row['triton']) > 0 for row in rows)
    assert 'triton to dense' in capsys.readouterr().out

    out.unlink()
    monkeypatch.setattr(
        benchmark, 'conv_case', lambda *args: conv._replace(triton=lambda: conv.torch() + 1)
    )
    with pytest.raises(SystemExit, match=r'error above 0\.0001 in: cell_conv'):
        benchmark.main(command)
    assert len(json.loads(out.read_text())['rows']) == 4


def test_without_cuda(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit) as stop:
        benchmark.main([])
    assert stop.value.code == 2
    assert 'need a CUDA device, and torch finds none' in capsys.readouterr().err


def test_bad_rounds(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(['--rounds', '0'])
    assert '--rounds must be at least 1, got 0' in capsys.readouterr().err
