import importlib.util
import json
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / 'benchmarks/swin_latency.py'


@pytest.fixture(scope='module')
def benchmark():
    spec = importlib.util.spec_from_file_location('swin_latency', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_backbones_have_the_same_weights(benchmark):
    dense, full, sparse = benchmark.build_backbones((1, 1, 6, 1)).values()
    for name, tensor in full.state_dict().items():
        assert torch.equal(sparse.state_dict()[name], tensor), name
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for ours, original in zip(full(x), dense(x), strict=True):
            torch.testing.assert_close(ours, original, atol=1e-5, rtol=0)


def test_table_and_json(benchmark, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'new' / 'result.json'
    monkeypatch.setitem(benchmark.ARCHS, 'tiny', (1, 1, 6, 1))
    command = f'swin_latency.py --arch tiny --size 64 --rounds 1 --out {out}'
    monkeypatch.setattr('sys.argv', command.split())
    benchmark.main()
    dense, full, sparse = json.loads(out.read_text())['rows']
    assert dense['ratio'] == 1
    assert dense['gmacs'] >= full['gmacs'] > sparse['gmacs'] > 0
    assert min(dense['median'], full['median'], sparse['median']) > 0
    assert 'sparse, keep ratio 0.7' in capsys.readouterr().out


def test_bad_arguments(benchmark, monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['swin_latency.py', '--rounds', '0'])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert '--rounds must be at least 1, got 0' in capsys.readouterr().err
