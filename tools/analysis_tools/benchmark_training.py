"""Times a training iteration of a sparse model beside that of its dense original."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmdynsparse.analysis.environment import environment
from mmdynsparse.analysis.models import load_models
from mmdynsparse.analysis.report import print_setting, print_table, write_json
from mmdynsparse.analysis.training import compare_training, training_batch
from mmdynsparse.utils.command_line.arguments import DTYPES, AnalysisParser, at_least
from mmdynsparse.utils.command_line.data_checks import check_data
from mmdynsparse.utils.command_line.errors import one_line_errors


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tool.

    Args:
        argv: Command line arguments. Defaults to None, those of the process.
    """
    parser = AnalysisParser(description=__doc__)
    parser.add_argument(
        '--batch-size', type=at_least(1), help="images per iteration; defaults to the config's"
    )
    parser.add_argument('--rounds', type=at_least(1), default=20, help='timed iterations of each')
    parser.add_argument('--warmup', type=at_least(0), default=3, help='iterations before them')
    args = parser.parse(argv)
    with one_line_errors():
        cfg, pair = load_models(args, DTYPES['fp32'])
        check_data(cfg, 'train')
        np.random.seed(args.seed)  # of the augmentation
        size = args.batch_size or cfg.train_dataloader.batch_size
        batch = training_batch(cfg, size)
        setting = dict(
            command=shlex.join(
                [
                    'tools/analysis_tools/benchmark_training.py',
                    *(sys.argv[1:] if argv is None else argv),
                ]
            ),
            **environment(next(pair.sparse.parameters()).device),
            dense=', '.join(pair.originals),
            weights=args.checkpoint or 'random',
            batch=size,
            iteration='preprocessing, losses, backward pass',
            teacher="forward pass of teacher='self', up to the logits; dense forward: of another",
            rounds=f'{args.rounds} after {args.warmup} for warming up',
        )
        print_setting(setting)
        rows = compare_training(pair, batch, args.rounds, args.warmup)
    header = ('pass', 'median ms', 'p10', 'p90', 'ratio to dense')
    keys = ('median', 'p10', 'p90', 'ratio')
    cells = [(row['model'], *(f'{row[key]:.2f}' for key in keys)) for row in rows]
    print_table('training iteration', header, cells)
    if args.out:
        write_json(dict(setting=setting, rows=rows), Path(args.out) / 'training.json')


if __name__ == '__main__':
    main()
