"""train.py and test.py as a user starts them: real processes, on the CPU."""

import json
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.config import Config


@pytest.fixture(scope='module')
def seg_run(
    write_config: Callable, run_tool: Callable, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, str]:
    """Config, work dir and output of a training run of a segmentor."""
    config, work_dir = write_config('seg'), tmp_path_factory.mktemp('seg')
    return config, work_dir, run_tool('train.py', config, '--work-dir', work_dir)


@pytest.fixture(scope='module')
def det_run(
    write_config: Callable, run_tool: Callable, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, str]:
    """The same for a detector."""
    config, work_dir = write_config('det'), tmp_path_factory.mktemp('det')
    return config, work_dir, run_tool('train.py', config, '--work-dir', work_dir)


def free_port() -> str:
    """Returns a port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return str(probe.getsockname()[1])


def test_train_segmentor(seg_run: tuple) -> None:
    _, work_dir, output = seg_run
    assert 'Iter(train) [4/4]' in output
    assert 'loss_keep_ratio' in output and 'keep_rate_0' in output
    assert 'mIoU' in output
    weights = torch.load(work_dir / 'iter_4.pth', weights_only=False)['state_dict']
    assert any('.predictors.' in key for key in weights)


def test_train_detector(det_run: tuple) -> None:
    _, work_dir, output = det_run
    assert 'Epoch(train) [2][2/2]' in output
    assert 'loss_keep_ratio' in output and 'loss_mask' in output
    assert 'coco/segm_mAP' in output
    assert (work_dir / 'epoch_2.pth').is_file()


def test_resume_continues_the_latest_checkpoint(
    seg_run: tuple, run_tool: Callable, tmp_path: Path
) -> None:
    config, trained, _ = seg_run
    work_dir = tmp_path / 'run'
    shutil.copytree(trained, work_dir)
    options = ('--cfg-options', 'train_cfg.max_iters=5', 'optim_wrapper.optimizer.lr=0.002')
    output = run_tool('train.py', config, '--work-dir', work_dir, '--resume', *options)
    assert 'resumed epoch: 0, iter: 4' in output
    assert 'Iter(train) [5/5]' in output and 'Iter(train) [4/5]' not in output
    assert Config.fromfile(work_dir / config.name).optim_wrapper.optimizer.lr == 0.002


def test_resume_from_path_in_mixed_precision(
    seg_run: tuple, run_tool: Callable, tmp_path: Path
) -> None:
    config, trained, _ = seg_run
    checkpoint = trained / 'iter_2.pth'
    output = run_tool('train.py', config, '--work-dir', tmp_path, '--amp', '--resume', checkpoint)
    assert 'resumed epoch: 0, iter: 2' in output
    assert 'Iter(train) [4/4]' in output
    dumped = Config.fromfile(tmp_path / config.name)
    expected = 'AmpOptimWrapper' if torch.cuda.is_available() else 'BFloat16OptimWrapper'
    assert dumped.optim_wrapper.type.endswith(expected)


def test_test_segmentor_with_tta_and_pictures(
    seg_run: tuple, run_tool: Callable, tmp_path: Path
) -> None:
    config, trained, _ = seg_run
    painted = tmp_path / 'painted'
    output = run_tool(
        'test.py', config, trained / 'iter_4.pth', '--work-dir', tmp_path / 'test',
        '--tta', '--show-dir', painted,
        '--cfg-options', 'model.backbone.sparsity.keep_ratio=[0.25]',
    )  # fmt: skip
    assert 'mIoU' in output and 'eval_keep_rate_0: 0.2500' in output
    assert len(list(painted.rglob('*.png'))) == 2


def test_test_segmentor_at_a_budget(seg_run: tuple, run_tool: Callable, tmp_path: Path) -> None:
    config, trained, _ = seg_run
    budgets = tmp_path / 'budgets.json'
    rows = {'0.8': dict(keep_ratios=dict(backbone=[0.25]))}
    budgets.write_text(json.dumps(dict(budgets=rows)))
    output = run_tool(
        'test.py', config, trained / 'iter_4.pth', '--work-dir', tmp_path / 'test',
        '--budget', f'{budgets}:0.8', '--tta',
    )  # fmt: skip
    assert 'mIoU' in output and 'eval_keep_rate_0: 0.2500' in output


def test_test_detector_writes_predictions_and_pictures(
    det_run: tuple, run_tool: Callable, tmp_path: Path
) -> None:
    config, trained, _ = det_run
    out = tmp_path / 'predictions.pkl'
    output = run_tool(
        'test.py', config, trained / 'epoch_2.pth', '--work-dir', tmp_path / 'test',
        '--out', out, '--show-dir', 'painted',
    )  # fmt: skip
    assert 'coco/bbox_mAP' in output
    predictions = pickle.loads(out.read_bytes())
    assert [p['img_id'] for p in predictions] == [0, 1]
    assert 'masks' in predictions[0]['pred_instances']
    assert len(list((tmp_path / 'test').glob('*/painted/*.jpg'))) == 2


def test_two_processes_train_and_test(
    write_config: Callable, run_tool: Callable, tmp_path: Path
) -> None:
    config, work_dir, out = write_config('seg'), tmp_path / 'run', tmp_path / 'out'
    output = run_tool('dist_train.sh', config, 2, '--work-dir', work_dir, PORT=free_port())
    assert output.count('Iter(train) [4/4]') == 1
    if not torch.cuda.is_available():
        assert output.count('replaced by BN') == 1
    weights = torch.load(work_dir / 'iter_4.pth', weights_only=False)['state_dict']
    assert not any(key.startswith('module.') for key in weights)
    output = run_tool(
        'dist_test.sh', config, work_dir / 'iter_4.pth', 2, '--work-dir', work_dir, '--out', out,
        PORT=free_port(),
    )  # fmt: skip
    assert 'Iter(test) [1/1]' in output and 'mIoU' in output
    assert sorted(path.name for path in out.iterdir()) == ['0.png', '1.png']


@pytest.mark.parametrize(
    ('package', 'task'),
    [('mmseg', 'seg'), pytest.param('mmdet', 'det', marks=pytest.mark.slow)],
)
def test_the_libraries_own_tools(
    package: str, task: str, write_config: Callable, tmp_path: Path
) -> None:
    tools = Path(pytest.importorskip(package).__file__).parent / '.mim' / 'tools'
    config, work_dir = write_config(task), tmp_path / 'run'

    def run(*command: object) -> str:
        command = [sys.executable, *map(str, command), '--work-dir', str(work_dir)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    output = run(tools / 'train.py', config)
    assert 'loss_keep_ratio' in output and 'eval_keep_rate_0' in output
    checkpoint = (work_dir / 'last_checkpoint').read_text()
    assert 'eval_keep_rate_0' in run(tools / 'test.py', config, checkpoint)


def test_bad_input_prints_one_line(run_tool: Callable, tmp_path: Path) -> None:
    output = run_tool('train.py', tmp_path / 'none.py', code=1)
    lines = output.strip().splitlines()
    assert lines == [
        f'train.py: error: config must be an existing file, got {str(tmp_path / "none.py")!r}'
    ]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='written for processes on the CPU')
@pytest.mark.parametrize('task', ['seg', 'det'])
def test_fine_tuning_in_two_processes(
    task: str, write_config: Callable, run_tool: Callable, tmp_path: Path
) -> None:
    """All hooks of fine-tuning, in mixed precision, interrupted and resumed."""
    hooks = (
        "dict(type='mmdynsparse.DenseSparseSchedule')",
        "dict(type='mmdynsparse.DistillationHook')",
        "dict(type='mmdynsparse.FreezePretrained', iters=1)",
        "dict(type='EMAHook')",
    )
    extra = f'custom_hooks += [{", ".join(hooks)}]\n'
    extra += "optim_wrapper['constructor'] = 'mmdynsparse.FineTuneOptimWrapperConstructor'\n"
    extra += "optim_wrapper['paramwise_cfg'] = dict(pretrained_lr_mult=0.2)\n"
    config = write_config(task, extra, name=f'{task}_fine_tuning')
    length = 'max_iters' if task == 'seg' else 'max_epochs'
    for part in (2, 4):
        options = ('--amp', '--resume', '--cfg-options', f'train_cfg.{length}={part}')
        args = (config, 2, '--work-dir', tmp_path / 'work', *options)
        output = run_tool('dist_train.sh', *args, PORT=free_port())
        assert ('resumed epoch' in output) == (part == 4)
        losses = ('loss_distill_logits',) if task == 'seg' else ('distill_rpn', 'distill_roi')
        assert all(loss in output for loss in ('loss_distill_backbone', *losses))
        assert 'nan' not in output
