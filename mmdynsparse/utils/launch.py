"""What the command line tools share: arguments, config, resume, errors and the runner."""

import argparse
import gc
import os
import os.path as osp
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import NoReturn

import torch.distributed as dist
from mmengine.config import Config, DictAction
from mmengine.hooks import Hook
from mmengine.registry import RUNNERS
from mmengine.runner import Runner, find_latest_checkpoint

LAUNCHERS = ('none', 'pytorch', 'slurm', 'mpi')
EXTRAS = {'mmseg': 'seg', 'mmdet': 'det'}


class ToolParser(argparse.ArgumentParser):
    """Argument parser that reports a wrong command line in one line.

    Args:
        description: What the tool does, for ``--help``.
    """

    def __init__(self, description: str) -> None:
        super().__init__(description=description)

    def add_run_arguments(self) -> None:
        """Adds the arguments that training and testing have in common."""
        self.add_argument('--work-dir', help='folder of logs, checkpoints and metrics')
        self.add_cfg_options()
        self.add_argument(
            '--launcher', choices=LAUNCHERS, default='none', help='how the processes are started'
        )
        # torch.distributed.launch of torch < 2.0 passes the first spelling, later ones the second.
        self.add_argument('--local_rank', '--local-rank', type=int, default=0)

    def add_cfg_options(self) -> None:
        """Adds the argument that overrides entries of the config."""
        self.add_argument(
            '--cfg-options',
            nargs='+',
            action=DictAction,
            metavar='KEY=VALUE',
            help='override entries of the config, e.g. model.backbone.sparsity.keep_ratio=0.5; '
            'lists are written key="[a,b]" or key=a,b, without white space',
        )

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parses the command line; a wrong one ends the process with exit code 2.

        Args:
            argv: The arguments. Defaults to None, the arguments of the process.

        Returns:
            The parsed arguments.
        """
        try:
            return self.parse_args(argv)
        except ValueError as error:
            self.error(f'argument --cfg-options: expected KEY=VALUE pairs ({error})')

    def error(self, message: str) -> NoReturn:
        """Ends the process with one line instead of argparse's usage text."""
        self.exit(2, f'{self.prog}: error: {message}\n')


class _EpochBegan(Hook):
    """Remembers whether a run has come to its first epoch."""

    def __init__(self) -> None:
        self.began = False

    def before_train_epoch(self, runner: Runner) -> None:
        self.began = True

    def before_test_epoch(self, runner: Runner) -> None:
        self.began = True


@contextmanager
def one_line_errors(runner: Runner | None = None) -> Iterator[None]:
    """Turns a ``ValueError`` about the user's input into one line on stderr and exit code 1.

    Subclasses such as ``UnicodeDecodeError`` come out of libraries, where the traceback is needed,
    and pass through like any other exception.

    Args:
        runner: The runner that trains or tests within the context. From its first epoch on, when
            hooks and optimizer have accepted their settings, errors pass through. Defaults to
            None.
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


def load_config(args: argparse.Namespace) -> Config:
    """Reads the config and applies the arguments common to training and testing.

    Args:
        args: Arguments ``config`` and those of ``ToolParser.add_run_arguments``.

    Returns:
        The config with ``work_dir`` and ``launcher`` set.

    Raises:
        ValueError: If the config, an override, the launcher's environment or the installation of
            the config's library is not usable.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if args.launcher == 'pytorch' and 'RANK' not in os.environ:
        raise ValueError(
            "--launcher 'pytorch' needs the variables that torchrun sets (start it through "
            'dist_train.sh or dist_test.sh), got no RANK in the environment'
        )
    if not osp.isfile(args.config):
        raise ValueError(f'config must be an existing file, got {args.config!r}')
    try:
        cfg = Config.fromfile(args.config)
    except Exception as error:
        raise ValueError(
            f'config must be a readable config file, got {args.config!r} '
            f'({type(error).__name__}: {error})'
        ) from error
    if args.cfg_options:
        _merge_options(cfg, args.cfg_options)
    name = osp.splitext(osp.basename(args.config))[0]
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or osp.join('work_dirs', name)
    cfg.launcher = args.launcher
    require_library(cfg.get('default_scope'))
    return cfg


def _merge_options(cfg: Config, options: dict) -> None:
    try:
        cfg.merge_from_dict(options)
    except Exception as error:
        raise ValueError(
            f'--cfg-options must name entries of the config, got {dict(options)} '
            f'({type(error).__name__}: {error})'
        ) from error


def require_library(scope: str | None) -> None:
    """Checks that the library which a config is written for can be imported.

    Args:
        scope: ``default_scope`` of the config: 'mmseg' or 'mmdet'.

    Raises:
        ValueError: If the scope is another one, or its library or mmcv is missing. The message
            names the extra to install.
    """
    if scope not in EXTRAS:
        raise ValueError(f"default_scope of the config must be 'mmseg' or 'mmdet', got {scope!r}")
    try:
        import_module('mmcv')
        import_module(scope)
    except ImportError as error:
        raise ValueError(
            f'a config with default_scope {scope!r} needs {scope} and mmcv: '
            f'pip install mmdynsparse[{EXTRAS[scope]}] (got {type(error).__name__}: {error})'
        ) from error


def set_resume(cfg: Config, resume: str | None) -> None:
    """Decides what training starts from.

    A ``load_from`` of the config stays in force when there is nothing to resume, so that a job
    which is always started with ``--resume`` begins its first run from the dense checkpoint.

    Args:
        cfg: The config, changed in place.
        resume: None keeps the config's own setting, 'auto' takes the latest checkpoint in
            ``work_dir`` where there is one, anything else is the path of a checkpoint.
    """
    if resume == 'auto' or (resume is None and cfg.get('resume') and not cfg.get('load_from')):
        resume = find_latest_checkpoint(cfg.work_dir)
        cfg.resume = resume is not None
    elif resume is not None:
        cfg.resume = True
    if resume is not None:
        cfg.load_from = resume


def build_runner(cfg: Config) -> Runner:
    """Builds the config's own runner where ``runner_type`` names one, mmengine's otherwise."""
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)


def leave_process_group() -> None:
    """End the communication of a distributed run, whose threads may abort the exit otherwise.

    They are joined where the last reference to the process group goes, and a runner that is
    done still has one: it is a part of cycles. A thread of gloo that outlives the interpreter's
    lock terminates the process (https://github.com/pytorch/pytorch/pull/179291).
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
