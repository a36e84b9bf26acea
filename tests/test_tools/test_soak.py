"""benchmarks/soak.py on a tiny model."""

import json
from collections.abc import Callable
from pathlib import Path
from runpy import run_path

import pytest

SOAK = run_path(str(Path(__file__).parents[2] / 'benchmarks' / 'soak.py'))


def samples(*mib: float, files: int = 9) -> list[dict]:
    return [dict(seconds=i, passes=i, mib=x, files=files) for i, x in enumerate(mib)]


@pytest.mark.parametrize(
    ('course', 'flat'),
    [
        (samples(1, 50, 100, 100, 100, 100, 100, 100.9), True),  # all growth is at the start
        (samples(*range(100, 108)), False),
        (samples(*[100] * 7) + samples(100, files=10) * 2, False),
    ],
)
def test_what_is_flat(course: list[dict], flat: bool) -> None:
    assert SOAK['summary'](course)['flat'] == flat


def test_bad_input(tmp_path: Path, write_config: Callable, capsys: pytest.CaptureFixture) -> None:
    def error(*args: object) -> str:
        with pytest.raises(SystemExit):
            SOAK['main']([*map(str, args), '--out', str(tmp_path)])
        return capsys.readouterr().err

    assert 'config must be an existing file, got none.py' in error('none.py')
    config = write_config('seg')
    assert '--minutes must be above 0, got 0.0' in error(config, '--minutes', 0)
    assert '--iters must be at least 1, got 0' in error(config, '--iters', 0)
    assert "default_scope 'mmseg', got 'mmdet'" in error(write_config('det'))


@pytest.mark.slow
def test_memory_and_open_files_stay_constant(write_config: Callable, tmp_path: Path) -> None:
    head = "model['decode_head'].update(type='mmdynsparse.SparseUPerHead', sparsity=dict("
    config = write_config('seg', f"{head}keep_ratio=0.3, predictor='backbone'))\n", name='soak')
    args = (config, '--minutes', 1, '--iters', 1000, '--out', tmp_path)
    SOAK['main']([str(arg) for arg in args])  # exits with 1 if one is not
    result = json.loads((tmp_path / 'soak.json').read_text())
    assert [row['phase'] for row in result['rows']] == ['inference', 'training']
    assert all(row['passes'] > 100 and row['flat'] for row in result['rows'])
    assert (tmp_path / 'soak.png').is_file()
