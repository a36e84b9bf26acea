"""benchmarks/ffn_paths.py on small shapes."""

import importlib.util
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / 'benchmarks/ffn_paths.py'


@pytest.fixture(scope='module')
def script():
    spec = importlib.util.spec_from_file_location('ffn_paths', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_of_a_stage(script):
    rows = script.measure(1, channels=16, side=10, batch=2, count=2, rounds=1)
    assert {(r['keep'], r['fast_path']) for r in rows} == {
        (ratio, fast) for ratio in script.RATIOS for fast in (True, False)
    }
    for row in rows:
        assert row['dense_macs'] == 2 * 100 * 8 * 16**2
        # An FFN costs 8 C^2 for each kept location, a fast path C^2 for each other one.
        kept = int(100 * row['keep']) / 100
        cost = kept + (1 - kept) / 8 * row['fast_path']
        assert row['macs_saved'] == pytest.approx(1 - cost)
        seen = 1 - row['gathered_ms'] / row['dense_ms']
        assert row['efficiency'] == pytest.approx(seen / row['macs_saved'])
        assert 0 < row['moving'] < 1 and row['parts_ms']['slow path'] > 0
        assert len(script.cells_of(row)) == len(script.COLUMNS)


def test_stage_of_swin_s(script):
    row = script.measure_swin_s(channels=16, side=10, batch=1, rounds=1)
    ffn = sum(n * (r + (1 - r) / 8) for r, n in script.SWIN_S.items()) * 100 * 8 * 16**2
    # At each location Linear(C, C), the local half of the next layer, and the two after it.
    predictor = 100 * (16 * 16 + 8 * 8 + 8 * 4 + 4 * 2) + 8 * 8
    saved = 1 - (ffn + 3 * predictor) / (16 * 100 * 8 * 16**2)
    assert row['macs_saved'] == pytest.approx(saved)
    assert row['parts_ms']['predictor'] > 0 and row['parts_ms']['selection'] > 0
    assert len(script.cells_of(row)) == len(script.COLUMNS)


@torch.no_grad()
def test_executions_agree(script):
    x = torch.randn(2, 25, 16)
    decision, blocks = script.random_decision(x, 5, 0.5), script.ffns(16, 2, fast_path=True)
    plans = [script.plan(decision, form, learns=False) for form in ('masked', 'gather')]
    masked, gathered = (script.run(x, blocks, how) for how in plans)
    torch.testing.assert_close(masked, gathered, atol=1e-5, rtol=0)
    assert not torch.allclose(gathered, script.run(x, blocks, script.DENSE), atol=1e-3)
