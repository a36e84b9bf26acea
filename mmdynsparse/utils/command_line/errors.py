"""Errors of the tools: one line about the user's input, or about what stopped a measurement."""

import os.path as osp
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mmengine.hooks import Hook
from mmengine.runner import Runner


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
