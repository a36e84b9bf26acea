"""benchmarks/soak.py on a tiny model."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from runpy import run_path

import pytest

SOAK = run_path(str(Path(__file__).parents[2] / 'benchmarks' / 'soak.py'))


FLAT = [100] * 8


def samples(
    in_use: Sequence[float] = FLAT, resident: Sequence[float] = FLAT, files: Sequence[int] = FLAT
) -> list[dict]:
    values = zip(in_use, resident, files, strict=True)
    return [
        dict(seconds=i, passes=i, in_use=x, resident=y, files=z)
        for i, (x, y, z) in enumerate(values)
    ]


@pytest.mark.parametrize(
    ('course', 'flat'),
    [
        (samples(in_use=[1, 50, 100, 100, 100, 100, 100, 101]), True),  # grows at the start
        (samples(in_use=[*range(100, 108)]), False),
        (samples(resident=[90, 90, 97, 98, 100, 100, 100, 101]), True),
        (samples(resident=[98, 98, 98, 98, 98, 98, 100, 100]), False),
        (samples(files=[9, 9, 9, 9, 9, 9, 10, 10]), False),
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
    assert '--iters must be at least 4, got 3' in error(config, '--iters', 3)
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
