"""What a training loses when the machine fails: nothing that was written before."""

import errno
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import HOOKS, TRANSFORMS, DefaultScope
from mmengine.visualization import Visualizer

from mmdynsparse.engine import SafeCheckpointHook
from mmdynsparse.utils.checkpoints import WholeFileBackend, check_checkpoint, newest_checkpoint

WHOLE = dict(state_dict={}, meta={}, message_hub={})


def is_whole(path: Path) -> bool:
    """Returns whether training can be resumed from a file, with finite weights."""
    weights = check_checkpoint('checkpoint', str(path), resume=True)['state_dict']
    return all(torch.isfinite(x).all() for x in weights.values())


# Files


def test_a_process_killed_while_it_writes(tmp_path: Path) -> None:
    path = tmp_path / 'iter_2.pth'
    WholeFileBackend().put(b'old', path)
    pid = os.fork()
    if pid == 0:
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
        try:
            WholeFileBackend().put(b'new', path)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert path.read_bytes() == b'old'
    assert len(list(tmp_path.iterdir())) == 2  # the new one, not whole
    WholeFileBackend().put(b'new', path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b'new']


def full_disk(descriptor: int) -> None:
    """Stands for ``os.fsync``."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / 'iter_2.pth'
    WholeFileBackend().put(b'old', path)
    monkeypatch.setattr(os, 'fsync', full_disk)
    with pytest.raises(OSError, match=r'No space left on device, to write 2\.0 MB') as info:
        WholeFileBackend().put(bytes(2_000_000), path)
    assert info.value.errno == errno.ENOSPC and info.value.filename == str(path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b'old']


def write_checkpoints(folder: Path) -> None:
    """Writes checkpoints of iterations 2 (whole), 4 (truncated) and 6 (weights only)."""
    for i in (2, 4, 6):
        path = folder / f'iter_{i}.pth'
        torch.save(WHOLE if i < 6 else dict(state_dict={}), path)
        os.utime(path, (i, i))
    truncated = (folder / 'iter_4.pth').read_bytes()[:-100]
    (folder / 'iter_4.pth').write_bytes(truncated)


def test_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    write_checkpoints(tmp_path)
    assert newest_checkpoint(tmp_path) == str(tmp_path / 'iter_2.pth')
    torch.save(WHOLE, tmp_path / 'best_mIoU_iter_4.pth')  # has no optimizer
    assert newest_checkpoint(tmp_path) == str(tmp_path / 'iter_2.pth')
    torch.save(WHOLE, tmp_path / 'epoch_1.pth')
    assert newest_checkpoint(tmp_path) == str(tmp_path / 'epoch_1.pth')


@pytest.mark.parametrize('last', ['iter_4.pth', 'gone/iter_4.pth', '', None])
def test_resume_names_the_newest_whole_checkpoint(
    last: str | None, fails: Callable, write_config: Callable, tmp_path: Path
) -> None:
    write_checkpoints(tmp_path)
    if last is not None:
        (tmp_path / 'last_checkpoint').write_text(last and str(tmp_path / last))
    line = fails('train.py', write_config('seg'), '--resume', '--work-dir', tmp_path)
    assert f'continue from the newest whole one with --resume {tmp_path}/iter_2.pth' in line
    assert str(tmp_path / (last or 'last_checkpoint')) in line


def test_resume_without_a_whole_checkpoint(
    fails: Callable, write_config: Callable, tmp_path: Path
) -> None:
    write_checkpoints(tmp_path)
    (tmp_path / 'iter_2.pth').unlink()
    path = tmp_path / 'iter_4.pth'
    line = fails('train.py', write_config('seg'), '--resume', path, '--work-dir', tmp_path)
    assert 'corrupt' in line and 'start without --resume' in line


# NaN


def hook_and_runner(folder: Path) -> tuple[SafeCheckpointHook, SimpleNamespace]:
    """Returns a hook in a training that has begun."""
    runner = SimpleNamespace(
        model=torch.nn.BatchNorm1d(2),
        work_dir=str(folder),
        iter=6,
        logger=SimpleNamespace(info=print),
        message_hub=SimpleNamespace(runtime_info={}),
    )
    hook = SafeCheckpointHook(interval=1000)
    hook.before_train(runner)
    return hook, runner


def test_a_nan_that_the_loss_scale_keeps_from_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = []
    target = 'mmdynsparse.engine.hooks.checkpoint_hook.print_log'
    monkeypatch.setattr(target, lambda text, **kwargs: messages.append(text))
    hook, runner = hook_and_runner(tmp_path)
    for loss in (1.0, float('nan')):
        hook.after_train_iter(runner, 0, outputs=dict(loss=torch.tensor(loss)))
    assert len(messages) == 1 and 'loss is nan in iteration 7' in messages[0]


@pytest.mark.parametrize('name', ['weight', 'running_mean'])
def test_a_nan_in_the_model_stops_training(name: str, tmp_path: Path) -> None:
    hook, runner = hook_and_runner(tmp_path)
    runner.model.state_dict()[name][1] = float('nan')
    message = f'got NaN or infinite values in 1 tensors .first {name!r}. in iteration 7.*--resume'
    with pytest.raises(FloatingPointError, match=message):
        hook.after_train_iter(runner, 0, outputs=dict(loss=torch.tensor(float('nan'))))
    with pytest.raises(FloatingPointError, match=message):
        hook.before_save_checkpoint(runner, dict(state_dict=runner.model.state_dict()))


# Trainings: two iterations to a checkpoint, of which one is kept.


class Fault:
    """Does something to the images that are loaded once the first checkpoint is there."""

    def __init__(self, kind: str, after: str) -> None:
        self.kind, self.after = kind, Path(after)

    def __call__(self, results: dict) -> dict:
        if self.after.exists():
            if self.kind == 'die':
                os.kill(os.getpid(), signal.SIGKILL)
            results['img'] = np.full_like(results['img'], np.nan, dtype=np.float32)
        return results


class KillOther(Hook):
    """Kills the process of rank 1 in iteration 3."""

    def before_train_iter(self, runner, batch_idx: int, data_batch: object = None) -> None:
        if runner.iter == 2 and runner.rank == 1:
            while not Path(runner.work_dir, 'last_checkpoint').exists():  # rank 0 writes it
                time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)


class KillWhileWriting(Hook):
    """Kills the process while it writes the second checkpoint."""

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        if runner.iter == 3:
            os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)


for registry, cls in ((TRANSFORMS, Fault), (HOOKS, KillOther), (HOOKS, KillWhileWriting)):
    registry.register_module(module=cls, force=True)

KEEP_ONE = "default_hooks['checkpoint']['max_keep_ckpts'] = 1\n"
FAULT = "train_dataloader['dataset']['pipeline'].insert(2, dict(type='Fault', **{}))\n"


@pytest.fixture
def train(load_tool: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Trains in this process."""
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.setattr(sys, 'argv', ['train.py'])

    def run(*args: object) -> None:
        for manager in (DefaultScope, MessageHub, MMLogger, Visualizer):
            manager._instance_dict.clear()
        load_tool('train.py').main([str(arg) for arg in args])

    return run


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob('*.pth*'))


def assert_resumes(train: Callable, config: Path, work_dir: Path) -> None:
    """Checks that the checkpoint left is whole, and that training goes on from there."""
    assert checkpoints(work_dir) == ['iter_2.pth'] and is_whole(work_dir / 'iter_2.pth')
    assert (work_dir / 'last_checkpoint').read_text() == str(work_dir / 'iter_2.pth')
    train(config, '--work-dir', work_dir, '--resume')
    assert checkpoints(work_dir) == ['iter_4.pth'] and is_whole(work_dir / 'iter_4.pth')


def test_training_on_a_disk_that_becomes_full(
    train: Callable,
    write_config: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    config = write_config('seg', KEEP_ONE, name='full')
    with monkeypatch.context() as patch:
        write = WholeFileBackend.put

        def put(backend: WholeFileBackend, content: bytes, path: str) -> None:
            if 'iter_4' in path:
                patch.setattr(os, 'fsync', full_disk)
            write(backend, content, path)

        patch.setattr(WholeFileBackend, 'put', put)
        with pytest.raises(OSError, match='No space left'):
            train(config, '--work-dir', tmp_path)
    expected = f'train.py: training stopped. Continue with --resume {tmp_path}/iter_2.pth'
    assert expected in capfd.readouterr().err
    assert_resumes(train, config, tmp_path)


@pytest.mark.slow
def test_training_whose_data_worker_dies(
    train: Callable, write_config: Callable, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    fault = FAULT.format(dict(kind='die', after=f'{tmp_path}/last_checkpoint'))
    workers = "train_dataloader['num_workers'] = 1\n"
    bad = write_config('seg', KEEP_ONE + workers + fault, name='worker')
    options = ('--cfg-options', 'train_cfg.max_iters=50', 'default_hooks.checkpoint.interval=2')
    with pytest.raises(RuntimeError, match='DataLoader worker'):
        train(bad, '--work-dir', tmp_path, *options)
    lines = capfd.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith('train.py: training stopped.')]
    assert 'lower train_dataloader.num_workers' in line
    newest = newest_checkpoint(tmp_path)
    assert newest is not None and line.endswith(f'--resume {newest}') and is_whole(Path(newest))
    good = write_config('seg', KEEP_ONE + workers, name='worker_good')
    train(good, '--work-dir', tmp_path, '--resume', '--cfg-options', 'train_cfg.max_iters=50')
    assert is_whole(tmp_path / 'iter_50.pth')


@pytest.mark.slow
@pytest.mark.parametrize('amp', [True, False])
def test_training_with_a_nan_in_a_batch(
    amp: bool, train: Callable, write_config: Callable, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    fault = FAULT.format(dict(kind='nan', after=f'{tmp_path}/last_checkpoint'))
    bad = write_config('seg', KEEP_ONE + fault, name='nan')
    with pytest.raises(FloatingPointError, match=r'in iteration 3, .* the data'):
        train(bad, '--work-dir', tmp_path, *(['--amp'] if amp else []))
    assert f'Continue with --resume {tmp_path}/iter_2.pth' in capfd.readouterr().err
    assert_resumes(train, write_config('seg', KEEP_ONE, name='nan_good'), tmp_path)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return str(probe.getsockname()[1])


@pytest.fixture
def faulty(write_config: Callable, tmp_path: Path) -> Callable:
    """Returns a config with one of the hooks above, and the PYTHONPATH that its process needs."""

    def arguments(hook: str) -> tuple[Path, str]:
        (tmp_path / 'faults.py').write_text(Path(__file__).read_text())
        extra = (
            "custom_imports = dict(imports=['faults'], allow_failed_imports=False)\n"
            f"custom_hooks += [dict(type='{hook}')]\n"
        )
        root = Path(__file__).parents[2]
        return write_config('seg', KEEP_ONE + extra, name=hook), f'{root}:{tmp_path}'

    return arguments


@pytest.mark.slow
def test_a_training_killed_while_it_writes_a_checkpoint(
    faulty: Callable, run_tool: Callable, train: Callable, write_config: Callable, tmp_path: Path
) -> None:
    (config, path), work_dir = faulty('KillWhileWriting'), tmp_path / 'work'
    run_tool('train.py', config, '--work-dir', work_dir, code=-signal.SIGKILL, PYTHONPATH=path)
    assert checkpoints(work_dir) == ['iter_2.pth', 'iter_4.pth.partial']
    # The next training must remove it, even if it writes none of that name.
    (work_dir / 'iter_4.pth.partial').rename(work_dir / 'iter_3.pth.partial')
    good = write_config('seg', KEEP_ONE, name='killed_good')
    train(good, '--work-dir', work_dir, '--resume')
    assert checkpoints(work_dir) == ['iter_4.pth'] and is_whole(work_dir / 'iter_4.pth')


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='written for processes on the CPU')
def test_a_training_one_of_whose_processes_dies(
    faulty: Callable, run_tool: Callable, train: Callable, write_config: Callable, tmp_path: Path
) -> None:
    (config, path), work_dir = faulty('KillOther'), tmp_path / 'work'
    args = (config, 2, '--work-dir', work_dir)
    output = run_tool('dist_train.sh', *args, code=1, PORT=free_port(), PYTHONPATH=path)
    assert 'SIGKILL' in output
    assert f'--resume {work_dir}/iter_2.pth' in output
    assert_resumes(train, write_config('seg', KEEP_ONE, name='rank_good'), work_dir)
