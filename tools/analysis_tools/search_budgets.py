"""Searches for the keep ratios of all sparse parts that cost what is asked and change least.

A share of 0.6 is 0.6 of the time (or multiply-adds) of the dense original on this device. Only
ratios change, the weights stay as they are. A run that was stopped goes on from OUT.partial.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from torch import nn

from mmdynsparse.analysis.budget_measures import (
    COSTS,
    Divergence,
    Measures,
    MetricLoss,
    Notes,
    replace_json,
    search_budgets,
)
from mmdynsparse.analysis.environment import environment
from mmdynsparse.analysis.images import dataset_batches, file_batches, find_images
from mmdynsparse.analysis.models import load_models
from mmdynsparse.analysis.report import print_setting, print_table
from mmdynsparse.models.budgets import add_budgets
from mmdynsparse.models.decider import deciders
from mmdynsparse.utils.checkpoints import read_checkpoint
from mmdynsparse.utils.command_line.arguments import AnalysisParser, at_least
from mmdynsparse.utils.command_line.data_checks import check_data
from mmdynsparse.utils.command_line.errors import one_line_errors


def share(text: str) -> float:
    """Parse a share of the dense original's cost."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f'must be in (0, 1], got {text!r}')
    return value


def build_parser() -> AnalysisParser:
    """Returns the parser of the command line."""
    parser = AnalysisParser(description=__doc__, out='file of the budgets, .json')
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument(
        '--images', nargs='+', help='files or folders: the least divergence of their predictions'
    )
    inputs.add_argument(
        '--metric', help="the highest value of this metric, such as mIoU, on the config's test set"
    )
    parser.add_argument(
        '--num-images', type=at_least(1), default=10, help='at most, spread over all there are'
    )
    for kind in COSTS:
        parser.add_argument(
            f'--{kind}', nargs='+', type=share, default=(), help='shares of the dense original'
        )
    parser.add_argument(
        '--evaluations', type=at_least(1), default=60, help='combinations tried for each share'
    )
    parser.add_argument(
        '--out-checkpoint', help='file of the weights again (.pth), which carries the budgets'
    )
    parser.add_argument(
        '--rounds', type=at_least(1), default=10, help='timed calls of each variant'
    )
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Checks what needs no model.

    Raises:
        ValueError: If no share is asked, or the output cannot be written.
    """
    if not args.latency and not args.gmacs:
        raise ValueError('--latency or --gmacs must have at least one share, got none')
    files = [('--out', args.out, '.json')]
    if args.out_checkpoint is not None:
        files.append(('--out-checkpoint', args.out_checkpoint, '.pth'))
        if not args.checkpoint:
            raise ValueError('--out-checkpoint needs a checkpoint, got random weights')
    for option, file, suffix in files:
        path = Path(file or '')
        if path.suffix != suffix or not path.parent.is_dir():
            raise ValueError(
                f'{option} must be a {suffix} file in an existing folder, got {file!r}'
            )


def load_batches(args: argparse.Namespace, cfg: Config) -> list[dict]:
    """Returns batches of one image.

    Raises:
        ValueError: If there are none.
    """
    if args.images:
        return list(file_batches(cfg, find_images(args.images), args.num_images))
    check_data(cfg, 'test')
    return list(dataset_batches(cfg, args.num_images))


def describe(args: argparse.Namespace, originals: Sequence[str], batches: Sequence[dict]) -> dict:
    """States how the numbers come about."""
    sizes = {'x'.join(map(str, image.shape[1:])) for data in batches for image in data['inputs']}
    return dict(
        command=shlex.join(['tools/analysis_tools/search_budgets.py', *args.argv]),
        **environment(torch.device(args.device)),
        dense=', '.join(originals),
        weights=args.checkpoint or 'random',
        input=', '.join(args.images or ['test set of the config']),
        images=len(batches),
        sizes=', '.join(sorted(sizes)),
        loss=args.metric or 'divergence',
        evaluations=args.evaluations,
        rounds=args.rounds,
        seed=args.seed,
    )


def note_key(setting: Mapping, cfg: Config, model: nn.Module, batches: Sequence[dict]) -> str:
    """Returns what names all that measurements depend on: setting, config, weights and images."""
    free = ('command', 'date', 'evaluations', 'input')
    kept = {key: value for key, value in setting.items() if key not in free}
    digest = sha256(repr((kept, cfg.to_dict())).encode())
    images = [image for data in batches for image in data['inputs']]
    for tensor in (*model.state_dict().values(), *images):
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def kind_of(budget: str) -> str:
    """Returns the cost that a budget's name is about."""
    return 'gmacs' if budget.startswith('gmacs-') else 'latency'


def report(budgets: Mapping[str, dict], loss: str) -> None:
    """Prints what was found."""
    costs = (*COSTS, 'gmacs_p95')
    header = ('budget', 'keep ratios', *costs, loss, 'equal ratios', *costs, loss)
    rows = []
    for name, row in budgets.items():
        parts = (f'{k} {" ".join(f"{r:g}" for r in v)}' for k, v in row['keep_ratios'].items())
        cells = [name, ', '.join(parts)]
        for side in (row, row['uniform']):
            cells += [f'{side[cost]:.3f}' for cost in costs] + [f'{side[loss]:.4g}']
        cells.insert(len(costs) + 3, f'{row["uniform"]["keep_ratio"]:g}')
        rows.append(cells)
    print_table('budgets, costs as shares of the dense original', header, rows)
    for name, row in budgets.items():
        if row[kind_of(name)] > 1.05 * float(name.split('-')[-1]):
            print(f'{name}: no ratios came within 5% of it; more --rounds may help')


def plot(budgets: Mapping[str, dict], loss: str, title: str, path: Path) -> None:
    """Plots the loss against the measured cost, beside that of equal ratios."""
    kinds = {kind: [] for kind in COSTS}
    for name, row in budgets.items():
        kinds[kind_of(name)].append(row)
    kinds = {kind: rows for kind, rows in kinds.items() if rows}
    figure = Figure(figsize=(5 * len(kinds), 4), layout='constrained')
    axes = figure.subplots(1, len(kinds), squeeze=False)[0]
    for ax, (kind, rows) in zip(axes, kinds.items(), strict=True):
        for label, sides in (('searched', rows), ('equal ratios', [r['uniform'] for r in rows])):
            points = sorted((side[kind], side[loss]) for side in sides)
            ax.plot(*zip(*points, strict=True), marker='o', label=label)
        ax.set_xlabel(f'measured {kind}, share of the dense original')
        ax.set_ylabel(loss)
        ax.legend()
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def save_checkpoint(args: argparse.Namespace, model: nn.Module, budgets: Mapping) -> None:
    """Writes the model's weights with the budgets, for set_budget and test.py --budget."""
    add_budgets(model, {name: row['keep_ratios'] for name, row in budgets.items()})
    meta = read_checkpoint('checkpoint', args.checkpoint).get('meta', {})
    # What init_model of mmseg and mmdet reads.
    meta = {'dataset_meta': meta['dataset_meta']} if 'dataset_meta' in meta else {}
    torch.save(dict(state_dict=model.state_dict(), meta=meta), args.out_checkpoint)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tool.

    Args:
        argv: Command line arguments. Defaults to None, those of the process.
    """
    args = build_parser().parse(argv)
    args.argv = sys.argv[1:] if argv is None else list(argv)
    with one_line_errors():
        check_arguments(args)
        out = Path(args.out)
        if args.images:
            find_images(args.images)
        cfg, pair = load_models(args, torch.float32)
        if not deciders(pair.sparse):
            raise ValueError(
                f'config must have a part with a keep ratio, got none in {args.config}'
            )
        batches = load_batches(args, cfg)
        setting = describe(args, pair.originals, batches)
        print_setting(setting)
        if args.metric:
            loss = MetricLoss(pair.sparse, batches, cfg, args.metric)
        else:
            loss = Divergence(pair.sparse, batches)
        key = note_key(setting, cfg, pair.sparse, batches)
        notes = Notes(out.with_name(f'{out.name}.partial'), key)
        measures = Measures(pair, batches, loss, notes, args.rounds)
        asked = {kind: tuple(dict.fromkeys(getattr(args, kind))) for kind in COSTS}
        asked = {kind: shares for kind, shares in asked.items() if shares}
        result = search_budgets(measures, asked, args.evaluations, args.seed)
        title = f'{setting["device"]}, {setting["threads"]} threads, {setting["sizes"]}'
        plot(result['budgets'], loss.name, title, out.with_suffix('.png'))
        replace_json(dict(setting=setting, **result), out)
        if args.out_checkpoint:
            save_checkpoint(args, pair.sparse, result['budgets'])
        notes.path.unlink()
        report(result['budgets'], loss.name)


if __name__ == '__main__':
    main()
