"""Counts the multiply-adds and parameters that a sparse model and its dense original execute."""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from torch import nn

from mmdynsparse.analysis.dense import Pair
from mmdynsparse.analysis.environment import environment
from mmdynsparse.analysis.flops import CostMeter
from mmdynsparse.analysis.images import dataset_batches, file_batches, find_images, image_batch
from mmdynsparse.analysis.models import check_sizes, load_models
from mmdynsparse.analysis.report import print_setting, print_table, write_json
from mmdynsparse.engine.hooks.sparsity_hook import recorded_keep_rates
from mmdynsparse.models.decider import keep_ratios
from mmdynsparse.utils.command_line.arguments import AnalysisParser, at_least, image_size
from mmdynsparse.utils.command_line.data_checks import check_data
from mmdynsparse.utils.command_line.errors import keep_partial, one_line_errors


def build_parser() -> AnalysisParser:
    """Returns the parser of the command line."""
    parser = AnalysisParser(description=__doc__)
    inputs = parser.add_mutually_exclusive_group()
    inputs.add_argument(
        '--images', nargs='+', help="files or folders; defaults to the config's test set"
    )
    inputs.add_argument(
        '--size', type=image_size, metavar='H or HxW', help='noise of this size (px) instead'
    )
    parser.add_argument(
        '--num-images', type=at_least(1), default=20, help='at most, spread over all there are'
    )
    parser.add_argument(
        '--depth', type=at_least(1), default=2, help='levels of modules in the table'
    )
    return parser


def open_images(args: argparse.Namespace, cfg: Config, pair: Pair) -> tuple[str, Iterator[dict]]:
    """Returns what the images are, and batches of one of them.

    Raises:
        ValueError: If there are none.
    """
    if args.size:
        check_sizes([args.size], pair)
        seeds = range(args.seed, args.seed + args.num_images)
        batches = (image_batch(1, args.size, cfg.default_scope, seed=seed) for seed in seeds)
        return f'random noise, {args.size[0]}x{args.size[1]}', batches
    if args.images:
        files = find_images(args.images)
        return ', '.join(args.images), file_batches(cfg, files, args.num_images)
    check_data(cfg, 'test')
    return 'test set of the config', dataset_batches(cfg, args.num_images)


def count(pair: Pair, batches: Iterator[dict], result: dict, depth: int) -> None:
    """Runs both models on all images and puts the mean costs into the result.

    Raises:
        ValueError: If it is stopped; the images before are in the result.
    """
    meters = dict(dense=CostMeter(pair.dense), sparse=CostMeter(pair.sparse))
    rates = []
    try:
        with keep_partial(result, lambda: f'{len(rates)} images'):
            for data in batches:
                with recorded_keep_rates(pair.sparse) as kept:
                    for meter in meters.values():
                        meter.run(partial(meter.model.test_step, data))
                rates.append(kept)
    finally:
        targets = keep_ratios(pair.sparse)
        result['images'] = len(rates)
        if rates:
            result['keep_rates'] = [
                dict(target=target, measured=rate)
                for target, rate in zip(targets, np.mean(rates, axis=0).tolist(), strict=True)
            ]
            result['modules'] = list(module_rows(meters, depth))


def module_rows(meters: dict[str, CostMeter], depth: int) -> Iterator[dict]:
    """Yields the costs of the modules down to a depth, those of the whole model first."""
    names = {side: module_names(meter.model, depth) for side, meter in meters.items()}
    for name in dict.fromkeys((*names['sparse'], *names['dense'])):
        row = dict(name=name or 'whole model')
        for side, meter in meters.items():
            cost = meter.cost(name) if name in names[side] else None
            row[side] = dict(
                gmacs=cost.macs / 1e9 if cost else 0.0, params=cost.params if cost else 0
            )
        if any(row[side][key] for side in meters for key in ('gmacs', 'params')):
            yield row


def module_names(model: nn.Module, depth: int) -> list[str]:
    """Names of the modules down to a depth."""
    return [name for name, _ in model.named_modules() if not name or name.count('.') < depth]


def report(result: dict) -> None:
    """Prints the keep rates and the costs."""
    rates = [
        (f'predictor {i}', f'{rate["target"]:.3f}', f'{rate["measured"]:.3f}')
        for i, rate in enumerate(result['keep_rates'])
    ]
    print_table('keep rates', ('', 'target', 'measured'), rates)
    cells = []
    for row in result['modules']:
        dense, sparse = row['dense'], row['sparse']
        share = f'{sparse["gmacs"] / dense["gmacs"]:.3f}' if dense['gmacs'] else '-'
        cells.append(
            (
                row['name'],
                *(f'{side["gmacs"]:.3f}' for side in (dense, sparse)),
                share,
                *(f'{side["params"] / 1e6:.3f}' for side in (dense, sparse)),
            )
        )
    header = ('module', 'dense GMACs', 'sparse GMACs', 'share', 'dense M params', 'sparse M params')
    print_table(f'executed, mean of {result["images"]} images', header, cells)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tool.

    Args:
        argv: Command line arguments. Defaults to None, those of the process.
    """
    args = build_parser().parse(argv)
    command = ['tools/analysis_tools/get_flops.py', *(sys.argv[1:] if argv is None else argv)]
    with one_line_errors():
        cfg, pair = load_models(args, torch.float32)
        source, batches = open_images(args, cfg, pair)
        setting = dict(
            command=shlex.join(command),
            **environment(torch.device(args.device)),
            dense=', '.join(pair.originals),
            weights=args.checkpoint or 'random',
            input=source,
            seed=args.seed,
        )
        print_setting(setting)
        result = dict(setting=setting)
        try:
            count(pair, batches, result, args.depth)
        finally:
            if result.get('images'):
                report(result)
                if args.out:
                    write_json(result, Path(args.out) / 'flops.json')


if __name__ == '__main__':
    main()
