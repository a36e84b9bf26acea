"""Errors of the tools: one line about the user's input, or about what stopped a measurement."""

import os.path as osp
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..checkpoints import newest_checkpoint


class _EpochBegan(Hook):
    """Remembers whether a run has come to its first epoch."""

    def __init__(self) -> None:
        self.began = False

    def before_train_epoch(self, runner: Runner) -> None:
        self.began = True

    before_test_epoch = before_train_epoch


@contextmanager
def one_line_errors(runner: Runner | None = None) -> Iterator[None]:
    """Turns a ``ValueError`` about the user's input into one line on stderr and exit code 1.

    Subclasses such as ``UnicodeDecodeError`` come out of libraries, where the traceback is needed,
    and pass through like any other exception.

    Args:
        runner: Trains or tests within the context. From its first epoch on, when hooks and
            optimizer have accepted their settings, errors pass through. Defaults to None.
    """
    epoch = _EpochBegan()
    if runner is not None:
        runner.register_hook(epoch, priority='LOWEST')
    try:
        yield
    except ValueError as error:
        if type(error) is not ValueError or epoch.began:
            raise
        program = osp.basename(sys.argv[0])
        print(f'{program}: error: {" ".join(str(error).split())}', file=sys.stderr, flush=True)
        raise SystemExit(1) from None


@contextmanager
def point_to_checkpoint(runner: Runner) -> Iterator[None]:
    """Says on stderr how to continue a training that an error, the user or SIGTERM ends.

    torchrun sends SIGTERM to the other processes when one has failed.

    Args:
        runner: Trains within the context.
    """
    epoch = _EpochBegan()
    runner.register_hook(epoch, priority='LOWEST')
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun may send a second one
        newest = newest_checkpoint(runner.work_dir) if epoch.began else None
        if newest is not None:
            reason = ''
            if 'DataLoader worker' in str(error):
                reason = (
                    ' A worker that the system kills has mostly run out of memory: lower '
                    'train_dataloader.num_workers or batch_size.'
                )
            program = osp.basename(sys.argv[0])
            text = f'{program}: training stopped.{reason} Continue with --resume {newest}'
            print(text, file=sys.stderr, flush=True)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def keep_partial(result: dict, count: Callable[[], str]) -> Iterator[None]:
    """Turn what stops a measurement into an error that says how much was measured before.

    Args:
        result: Gets the traceback under 'error'.
        count: Says how much there is.

    Raises:
        ValueError: If anything fails or the user interrupts.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        result['error'] = traceback.format_exc()
        reason = type(error).__name__ + (f': {error}' if str(error) else '')
        reason = ' '.join(reason.split())[:300]
        raise ValueError(f'stopped by {reason}; measured before: {count()}') from error
