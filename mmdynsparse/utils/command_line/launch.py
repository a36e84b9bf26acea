"""What a run is started from: config, checkpoint to resume, and the runner."""

import argparse
import gc
import os
import os.path as osp
from importlib import import_module

import torch.distributed as dist
from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner, find_latest_checkpoint

from ... import registry  # noqa: F401, tells mmengine where mmdynsparse:: is
from ..checkpoints import newest_checkpoint

EXTRAS = {'mmseg': 'seg', 'mmdet': 'det'}


def load_config(args: argparse.Namespace) -> Config:
    """Reads the config and applies the arguments of ``ToolParser.add_run_arguments``.

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

    Raises:
        ValueError: If the scope is neither 'mmseg' nor 'mmdet', or its library or mmcv is missing.
            The message names the extra to install.
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

    Raises:
        ValueError: If there are checkpoints in ``work_dir``, but which one is the latest got lost.
    """
    if resume == 'auto' or (resume is None and cfg.get('resume') and not cfg.get('load_from')):
        resume = find_latest_checkpoint(cfg.work_dir) or None
        if resume is None and (newest := newest_checkpoint(cfg.work_dir)):
            raise ValueError(
                f'--resume needs the name of a checkpoint in {cfg.work_dir}/last_checkpoint, got '
                f'none; continue from the newest whole one with --resume {newest}, or start anew '
                'in another --work-dir'
            )
        cfg.resume = resume is not None
    elif resume is not None:
        cfg.resume = True
    if resume is not None:
        cfg.load_from = resume


def keep_checkpoints_whole(cfg: Config) -> None:
    """Let ``SafeCheckpointHook`` write the checkpoints where mmengine's own hook would."""
    hooks = cfg.get('default_hooks') or {}
    hook = hooks.get('checkpoint', dict(type='CheckpointHook'))
    if 'runner_type' not in cfg and hook is not None and hook['type'] == 'CheckpointHook':
        hook = dict(hook, type='mmdynsparse.SafeCheckpointHook')
        cfg.default_hooks = dict(hooks, checkpoint=hook)


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
