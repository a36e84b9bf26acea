"""Evaluates a segmentor or a detector; the config's ``default_scope`` tells which."""

import argparse
from collections.abc import Sequence
from copy import deepcopy

from mmengine.config import Config

from mmdynsparse import set_budget
from mmdynsparse.utils.checkpoints import check_checkpoint, check_weights, read_checkpoint, unwrap
from mmdynsparse.utils.command_line.arguments import ToolParser
from mmdynsparse.utils.command_line.cpu import adapt_to_cpu
from mmdynsparse.utils.command_line.data_checks import check_data, check_not_empty
from mmdynsparse.utils.command_line.errors import one_line_errors
from mmdynsparse.utils.command_line.launch import (
    build_runner,
    leave_process_group,
    load_config,
)

FLIP_META_KEYS = (
    'img_id',
    'img_path',
    'ori_shape',
    'img_shape',
    'scale_factor',
    'flip',
    'flip_direction',
)


def build_parser() -> ToolParser:
    """Returns the parser of the command line."""
    parser = ToolParser(description='Evaluate a segmentor or a detector')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_run_arguments()
    parser.add_argument(
        '--out',
        help='predictions for offline evaluation: a .pkl file for mmdet, a folder for mmseg',
    )
    parser.add_argument('--show', action='store_true', help='show the predictions in a window')
    parser.add_argument('--show-dir', help='folder for the painted images')
    parser.add_argument('--wait-time', type=float, default=2, help='time an image is shown (s)')
    parser.add_argument(
        '--budget',
        help='name of a budget of the checkpoint, or FILE.json:NAME for one of a file of '
        'search_budgets.py; 1.0 keeps everything',
    )
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    return parser


def set_visualization(cfg: Config, args: argparse.Namespace) -> None:
    """Switches on painting of the predictions.

    Args:
        cfg: The config, changed in place.
        args: Arguments ``show``, ``show_dir`` and ``wait_time``.

    Raises:
        ValueError: If the config has no visualization hook.
    """
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    if hook is None:
        raise ValueError('--show and --show-dir need default_hooks.visualization, got none')
    hook.draw = True
    if args.show:
        hook.show = True
        hook.wait_time = args.wait_time
    if args.show_dir and cfg.default_scope == 'mmdet':
        hook.test_out_dir = args.show_dir
    elif args.show_dir:
        cfg.visualizer.save_dir = args.show_dir


def set_output(cfg: Config, out: str) -> None:
    """Adds the writing of predictions to the evaluation.

    Args:
        cfg: The config, changed in place.
        out: A ``.pkl`` file for mmdet, a folder for mmseg.

    Raises:
        ValueError: If the file's name does not end in ``.pkl`` or ``.pickle``.
    """
    evaluator = cfg.test_evaluator
    evaluators = [evaluator] if isinstance(evaluator, dict) else list(evaluator)
    if cfg.default_scope == 'mmseg':
        evaluators[0]['output_dir'] = out
    elif out.endswith(('.pkl', '.pickle')):
        evaluators.append(dict(type='DumpDetResults', out_file_path=out))
    else:
        raise ValueError(f"--out must end in '.pkl' or '.pickle' for mmdet, got {out!r}")
    cfg.test_evaluator = evaluators


def set_tta(cfg: Config) -> None:
    """Replaces model and test pipeline by those for test-time augmentation.

    Args:
        cfg: The config, changed in place. ``tta_model`` and ``tta_pipeline`` have a default for
            mmdet: flipped and plain image, boxes merged by NMS.

    Raises:
        ValueError: If they are missing in an mmseg config, or if a detector has a mask head:
            mmdet merges boxes only.
    """
    if 'mask_head' in cfg.model.get('roi_head', {}):
        raise ValueError('--tta of mmdet needs a model without masks, got model.roi_head.mask_head')
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    if cfg.default_scope == 'mmdet':
        _set_mmdet_tta_defaults(cfg, dataset)
    missing = [key for key in ('tta_model', 'tta_pipeline') if cfg.get(key) is None]
    if missing:
        raise ValueError(f'--tta needs tta_model and tta_pipeline in the config, got no {missing}')
    dataset.pipeline = cfg.tta_pipeline
    cfg.model = dict(**cfg.tta_model, module=cfg.model)


def _set_mmdet_tta_defaults(cfg: Config, dataset: dict) -> None:
    if cfg.get('tta_model') is None:
        nms = dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
        cfg.tta_model = dict(type='DetTTAModel', tta_cfg=nms)
    if cfg.get('tta_pipeline') is None:
        flips = [dict(type='RandomFlip', prob=prob) for prob in (1.0, 0.0)]
        pack = [dict(type='PackDetInputs', meta_keys=FLIP_META_KEYS)]
        augment = dict(type='TestTimeAug', transforms=[flips, pack])
        cfg.tta_pipeline = [*deepcopy(dataset.pipeline[:-1]), augment]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tool.

    Args:
        argv: Command line arguments. Defaults to None, those of the process.
    """
    args = build_parser().parse(argv)
    with one_line_errors():
        cfg = load_config(args)
        check_data(cfg, 'test')
        checkpoint = check_checkpoint('checkpoint', args.checkpoint)
        cfg.load_from, cfg.resume = args.checkpoint, False
        if args.show or args.show_dir:
            set_visualization(cfg, args)
        if args.out:
            set_output(cfg, args.out)
        if args.tta:
            set_tta(cfg)
        adapt_to_cpu(cfg)
        runner = build_runner(cfg)
        check_not_empty(runner, 'test')
        # An address is fetched only now that the processes of a distributed run know each other.
        checkpoint = checkpoint or read_checkpoint('checkpoint', args.checkpoint)
        weights = checkpoint.get('state_dict', checkpoint)
        check_weights(runner.model, weights, args.checkpoint)
        if args.budget:
            set_budget(unwrap(runner.model), args.budget)
    with one_line_errors(runner):
        runner.test()


if __name__ == '__main__':
    main()
    leave_process_group()
