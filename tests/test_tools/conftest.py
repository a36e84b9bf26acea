"""A data set of six images, two tiny configs on it and the means to run the tools."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DefaultScope
from mmengine.visualization import Visualizer
from PIL import Image

ROOT = Path(__file__).parents[2]
CONFIGS = Path(__file__).parent / 'configs'
SIZE = 64
# Models this small run many times slower when threads wait for a busy core.
THREADS = {'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1'}


def _write_split(root: Path, split: str, count: int, rng: np.random.Generator) -> None:
    """Bright rectangles of class 1 on a dark ground of class 0, one on each image."""
    images, annotations = [], []
    for folder in ('images', 'annotations'):
        (root / folder / split).mkdir(parents=True)
    for i in range(count):
        x, y, w, h = (int(v) for v in rng.integers((4, 4, 16, 16), (20, 20, 40, 40)))
        labels = np.zeros((SIZE, SIZE), np.uint8)
        labels[y : y + h, x : x + w] = 1
        pixels = (60 + 120 * labels[..., None] + rng.integers(0, 40, (SIZE, SIZE, 3))).astype('u1')
        Image.fromarray(pixels).save(root / 'images' / split / f'{i}.jpg')
        Image.fromarray(labels).save(root / 'annotations' / split / f'{i}.png')
        images.append(dict(id=i, file_name=f'{i}.jpg', width=SIZE, height=SIZE))
        polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
        annotations.append(
            dict(
                id=i + 1,
                image_id=i,
                category_id=1,
                bbox=[x, y, w, h],
                area=w * h,
                iscrowd=0,
                segmentation=[polygon],
            )
        )
    coco = dict(images=images, annotations=annotations, categories=[dict(id=1, name='thing')])
    (root / f'{split}.json').write_text(json.dumps(coco))


@pytest.fixture(scope='session')
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the data set, in mmseg's layout and with COCO annotations."""
    root = tmp_path_factory.mktemp('data')
    rng = np.random.default_rng(0)
    _write_split(root, 'train', 4, rng)
    _write_split(root, 'val', 2, rng)
    return root


@pytest.fixture(scope='session')
def write_config(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Writes a config that inherits a tiny one: ``write_config('seg', 'max_iters = 3')``."""
    folder = tmp_path_factory.mktemp('configs')

    def write(task: str, extra: str = '', name: str | None = None) -> Path:
        base = (CONFIGS / f'{task}.py').read_text()
        path = folder / f'{name or task}.py'
        path.write_text(base.replace('DATA_ROOT', str(data_root)) + extra)
        return path

    return write


@pytest.fixture(scope='session')
def run_tool() -> Callable:
    """Runs a tool as a process: ``run_tool('train.py', config)``; a script runs under bash."""

    def run(name: str, *args: object, code: int = 0, **env: str) -> str:
        tool = ROOT / 'tools' / name
        program = 'bash' if tool.suffix == '.sh' else sys.executable
        env = {**os.environ, 'PYTHON': sys.executable, 'PYTHONPATH': str(ROOT), **THREADS, **env}
        env = {key: value for key, value in env.items() if key not in ('LOCAL_RANK', 'RANK')}
        result = subprocess.run(
            [program, str(tool), *map(str, args)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert result.returncode == code, result.stdout[-6000:]
        return result.stdout

    return run


@pytest.fixture(scope='session')
def load_tool() -> Callable[[str], ModuleType]:
    """Imports a tool as a module."""

    def load(name: str) -> ModuleType:
        path = ROOT / 'tools' / name
        spec = spec_from_file_location(f'tool_{path.stem}', path)
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def fails(
    load_tool: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., str]:
    """Runs a tool in this process, expects it to end in one line on stderr and returns it."""
    monkeypatch.setenv('LOCAL_RANK', '0')
    # mmengine's global instances would write to the streams of an earlier test.
    for manager in (DefaultScope, MessageHub, MMLogger, Visualizer):
        manager._instance_dict.clear()

    def run(name: str, *args: object) -> str:
        monkeypatch.setattr(sys, 'argv', [name])
        with pytest.raises(SystemExit) as exit_info:
            load_tool(name).main([str(arg) for arg in args])
        assert exit_info.value.code in (1, 2)
        stderr = capsys.readouterr().err
        lines = [line for line in stderr.splitlines() if 'error:' in line]
        assert len(lines) == 1, stderr
        assert 'Traceback' not in stderr
        return lines[0]

    return run
