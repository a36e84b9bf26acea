"""Trains a segmentor or a detector; the config's ``default_scope`` tells which."""

from collections.abc import Sequence

from mmengine.config import Config

from mmdynsparse.utils.checkpoints import read_checkpoint
from mmdynsparse.utils.command_line.arguments import ToolParser
from mmdynsparse.utils.command_line.cpu import adapt_to_cpu
from mmdynsparse.utils.command_line.data_checks import check_not_empty, check_training_inputs
from mmdynsparse.utils.command_line.errors import one_line_errors, point_to_checkpoint
from mmdynsparse.utils.command_line.launch import (
    build_runner,
    keep_checkpoints_whole,
    leave_process_group,
    load_config,
    set_resume,
)


def build_parser() -> ToolParser:
    """Returns the parser of the command line."""
    parser = ToolParser(description='Train a segmentor or a detector')
    parser.add_argument('config', help='config file')
    parser.add_run_arguments()
    parser.add_argument('--amp', action='store_true', help='train in mixed precision')
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help='scale the learning rate by the batch size'
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='continue from this checkpoint; without a path from the latest one in the work dir',
    )
    return parser


def enable_amp(cfg: Config) -> None:
    """Switches the optimizer wrapper to mixed precision.

    Args:
        cfg: The config, changed in place.

    Raises:
        ValueError: If the config has an optimizer wrapper for which there is no such variant.
    """
    name = cfg.optim_wrapper.get('type', 'OptimWrapper')
    if name not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise ValueError(
            "--amp needs an optim_wrapper.type in ('OptimWrapper', 'AmpOptimWrapper'), "
            f'got {name!r}'
        )
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


def enable_auto_scale_lr(cfg: Config) -> None:
    """Lets the runner scale the learning rate by the real batch size.

    Args:
        cfg: The config, changed in place.

    Raises:
        ValueError: If the config does not say for which batch size its learning rate is meant.
    """
    setting = cfg.get('auto_scale_lr') or {}
    if 'base_batch_size' not in setting:
        raise ValueError(
            '--auto-scale-lr needs auto_scale_lr.base_batch_size in the config, '
            f'got auto_scale_lr={dict(setting)}'
        )
    cfg.auto_scale_lr.enable = True


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tool.

    Args:
        argv: Command line arguments. Defaults to None, those of the process.
    """
    args = build_parser().parse(argv)
    with one_line_errors():
        cfg = load_config(args)
        if args.amp:
            enable_amp(cfg)
        if args.auto_scale_lr:
            enable_auto_scale_lr(cfg)
        set_resume(cfg, args.resume)
        check_training_inputs(cfg)
        adapt_to_cpu(cfg)
        keep_checkpoints_whole(cfg)
        runner = build_runner(cfg)
        check_not_empty(runner, 'train')
        # An address is fetched only now that the processes of a distributed run know each other.
        if '://' in (cfg.get('load_from') or ''):
            read_checkpoint('load_from', cfg.load_from)
    with one_line_errors(runner), point_to_checkpoint(runner):
        runner.train()


if __name__ == '__main__':
    main()
    leave_process_group()
