"""Writes the sparse form of a dense config of mmseg or mmdet, and says what it costs."""

import os.path as osp
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from mmdynsparse.analysis.dense import share_weights
from mmdynsparse.analysis.model_parts import to_device
from mmdynsparse.analysis.models import load_weights
from mmdynsparse.analysis.report import print_table
from mmdynsparse.models.decider import keep_ratios
from mmdynsparse.sparsify import PARTS, Draft, Measured, draft_config, measure
from mmdynsparse.sparsify.build import build_models, set_budget
from mmdynsparse.sparsify.measure import default_size, gmacs, noise
from mmdynsparse.utils.command_line.arguments import (
    ToolParser,
    at_least,
    check_device,
    image_size,
)
from mmdynsparse.utils.command_line.errors import one_line_errors

ALL = 'all'


def build_parser() -> ToolParser:
    """Returns the parser of the command line."""
    parser = ToolParser(description=__doc__)
    parser.add_argument('config', help='dense config, of either style of mmengine')
    parser.add_argument('checkpoint', nargs='?', help='dense checkpoint to start from')
    parser.add_argument('-o', '--out', required=True, help='the config to write')
    parser.add_argument(
        '--budget',
        help="largest share of the dense model's multiply-adds, in (0, 1], or 'all' to train for "
        'every keep ratio; defaults to the keep ratios that the study found',
    )
    parser.add_argument('--parts', nargs='+', choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument(
        '--no-training', action='store_true', help='only what a dense checkpoint needs no training'
    )
    parser.add_argument(
        '--length',
        type=at_least(1),
        metavar='N',
        help='iterations or epochs of the fine-tuning, whichever the config counts; defaults to a '
        'tenth of the dense schedule',
    )
    parser.add_argument(
        '--size',
        type=image_size,
        metavar='H or HxW',
        help="image (px) to measure with; defaults to the config's crop or test scale",
    )
    parser.add_argument(
        '--rounds', type=at_least(0), default=10, help='timed calls of each model; 0 for none'
    )
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu', help='to measure on')
    return parser


def parse_budget(text: str | None, training: bool) -> float | str | None:
    """Returns the budget as a number, 'all' or None.

    Raises:
        ValueError: If it is something else, or needs a training that is not wanted.
    """
    if text is None or (text == ALL and training):
        return text
    try:
        budget = float(text)
    except ValueError:
        budget = 0.0
    if not 0 < budget <= 1:
        allowed = f"in (0, 1] or '{ALL}'" if training else 'in (0, 1] with --no-training'
        raise ValueError(f'--budget must be {allowed}, got {text!r}')
    return budget


def prepare(draft: Draft, checkpoint: str | None, device: str) -> dict[str, nn.Module]:
    """Builds both models with the same weights, those of the checkpoint if there is one."""
    torch.manual_seed(0)
    sparse, dense = build_models(draft)
    if checkpoint:
        load_weights(sparse, checkpoint)
    share_weights(sparse, dense)
    for model in (sparse, dense):
        to_device(model, check_device(device), torch.float32)
    return dict(dense=dense, sparse=sparse)


def report(draft: Draft, measured: Measured, sparse: nn.Module, setting: str) -> None:
    """Prints what was replaced and what both models cost."""
    rows = [(p.key, p.before, p.after or '-', p.note) for p in draft.parts]
    print_table('parts of the model', ('part', 'was', 'is', 'why'), rows)
    rows = []
    for name, count in measured.gmacs.items():
        latency = measured.latency.get(name)
        fewer = measured.gmacs['dense'] / count
        cells = [f'{count:.2f}', f'{fewer:.2f} x' + (', more' if fewer < 1 else '')]
        if latency:
            speed_up = measured.latency['dense'].median / latency.median
            cells.append(f'{latency.median:.0f}')
            cells.append(f'{speed_up:.2f} x' + (', slower' if speed_up < 1 else ''))
        rows.append((name, *cells))
    header = ('model', 'GMACs', 'fewer', 'median ms', 'faster')[: len(rows[0])]
    print_table(f'whole model, {setting}', header, rows)
    if measured.gmacs['sparse'] > measured.gmacs['dense']:
        print('more multiply-adds than dense: halos of cells cost more than is saved, so leave the')
        print('backbone out of --parts or give a --budget')
    if ratios := keep_ratios(sparse):
        print('keep ratios:', ' '.join(f'{ratio:g}' for ratio in ratios))


def next_command(draft: Draft, out: str, checkpoint: str | None) -> str:
    """Returns the command that comes next."""
    if 'custom_hooks' not in draft.changes:
        return shlex.join(['python', 'tools/test.py', out, checkpoint or 'DENSE_CHECKPOINT'])
    command = ['python', 'tools/train.py', out]
    if not checkpoint:
        command += ['--cfg-options', 'load_from=DENSE_CHECKPOINT']
    return shlex.join(command)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tool.

    Args:
        argv: Command line arguments. Defaults to None, those of the process.
    """
    args = build_parser().parse(argv)
    warnings.filterwarnings('ignore', category=UserWarning)  # of configs that are years old
    with one_line_errors():
        if not args.out.endswith('.py') or osp.exists(args.out):
            raise ValueError(
                f'--out must be a new file that ends in .py, got {args.out!r}'
                + (', which exists' if osp.exists(args.out) else '')
            )
        training = not args.no_training
        if args.length and not training:
            raise ValueError(f'--length must not be given with --no-training, got {args.length}')
        budget = parse_budget(args.budget, training)
        draft = draft_config(
            args.config, args.parts, training, args.checkpoint, budget == ALL, args.length
        )
        models = prepare(draft, args.checkpoint, args.device)
        size = args.size or default_size(draft)
        data = noise(draft, size)
        if isinstance(budget, float):
            dense = gmacs(models['dense'], data)
            set_budget(
                draft, models['sparse'], budget, lambda: gmacs(models['sparse'], data) / dense
            )
        text = draft.text(args.out)
        measured = measure(models, data, args.rounds)
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(text, encoding='utf-8')
        threads = f'{torch.get_num_threads()} threads' if args.device == 'cpu' else args.device
        setting = f'{size[0]}x{size[1]}, batch 1, {threads}'
        report(draft, measured, models['sparse'], setting)
        print(f'\nwritten: {args.out}\nnext:    {next_command(draft, args.out, args.checkpoint)}')


if __name__ == '__main__':
    main()
