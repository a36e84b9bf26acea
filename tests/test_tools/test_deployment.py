"""tools/deployment and the benchmark's backends on tiny models."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')


@pytest.fixture
def model(write_config: Callable, tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    """Writes a config and a checkpoint."""

    def write(task: str) -> tuple[Path, Path]:
        config = write_config(task)
        cfg = Config.fromfile(config)
        init_default_scope(cfg.default_scope)
        torch.manual_seed(0)
        checkpoint = tmp_path / 'checkpoint.pth'
        torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), checkpoint)
        return config, checkpoint

    return write


@pytest.fixture
def call(load_tool: Callable) -> Callable:
    def run(tool: str, *args: object) -> None:
        MMLogger._instance_dict.clear()
        load_tool(tool).main([str(arg) for arg in args])

    return run


def metrics(folder: Path) -> dict:
    return json.loads(max(folder.glob('*/*.json')).read_text())


@pytest.mark.slow
@pytest.mark.parametrize(('task', 'metric'), [('seg', 'mIoU'), ('det', 'coco/bbox_mAP')])
def test_exported_models_score_as_in_torch(
    task: str, metric: str, model: Callable, call: Callable, tmp_path: Path, data_root: Path, capsys
) -> None:
    config, checkpoint = model(task)
    file = tmp_path / 'model.onnx'
    image = data_root / 'images/val/0.jpg'
    arguments = ['--out', file, '--size', 64, '--verify', image]
    call('deployment/export_onnx.py', config, checkpoint, *arguments)
    printed = capsys.readouterr().out
    difference = float(printed.split('largest difference from torch ')[1].split(',')[0].split()[0])
    assert difference < 1e-3
    rois = [checkpoint] if task == 'det' else []
    call('deployment/test_exported.py', config, file, *rois, '--work-dir', tmp_path / 'exported')
    call('test.py', config, checkpoint, '--work-dir', tmp_path / 'torch')
    ours, theirs = metrics(tmp_path / 'exported'), metrics(tmp_path / 'torch')
    assert ours[metric] == pytest.approx(theirs[metric], abs=0.05)


@pytest.mark.slow
def test_backends_side_by_side(model: Callable, call: Callable, tmp_path: Path, capsys) -> None:
    config, _ = model('seg')
    arguments = ['--backends', 'torch', 'onnxruntime', 'onnxruntime-int8', '--sizes', 64]
    call(
        'analysis_tools/benchmark.py',
        config,
        *arguments,
        *('--rounds', 1, '--warmup', 0, '--out', tmp_path),
    )
    rows = json.loads((tmp_path / 'benchmark.json').read_text())['rows']
    assert [(row['part'], row['backend'], row['model']) for row in rows] == [
        (part, backend, name)
        for part in ('backbone', 'whole')
        for name in ('dense', 'sparse')
        for backend in ('torch', 'onnxruntime', 'onnxruntime-int8')
    ]
    assert all(row['median'] > 0 for row in rows)
    for row in rows:
        assert (row['difference'] < 1e-3) == ('int8' not in row['backend'])
    assert 'over its dense' in capsys.readouterr().out


def test_bad_input(model: Callable, call: Callable, tmp_path: Path, capsys) -> None:
    config, checkpoint = model('seg')
    export = ['deployment/export_onnx.py', config, checkpoint, '--out']
    there = tmp_path / 'there.onnx'
    there.write_text('mine')
    for arguments, message in (
        ([*export, there, '--size', 64], 'out must not exist yet'),
        (
            [*export, tmp_path / 'new.onnx'],
            '--size must be given where the config has no crop_size',
        ),
        (
            [*export, tmp_path / 'new.onnx', '--verify', 'nowhere.jpg'],
            '--verify must be an existing',
        ),
        ([*export, tmp_path / 'new.onnx', '--size', 64, '--budget', 0.6], 'budget must be 1.0'),
        (['deployment/test_exported.py', config, 'nowhere.onnx'], 'path must be an existing file'),
        (['deployment/test_exported.py', config, there], 'there.onnx'),
        (
            ['analysis_tools/benchmark.py', config, '--backends', 'torch', '--dtype', 'bf16'],
            "--backends needs --device 'cpu', --dtype 'fp32'",
        ),
        (
            ['analysis_tools/benchmark.py', config, '--backends', 'torch', '--parts', 'head'],
            '--parts must be backbone and whole with --backends',
        ),
    ):
        with pytest.raises(SystemExit):
            call(*arguments)
        assert message in capsys.readouterr().err
    assert there.read_text() == 'mine' and not (tmp_path / 'new.onnx').exists()
