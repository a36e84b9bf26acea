"""What sparsity costs in accuracy, beside the controls.

    python benchmarks/accuracy_study.py dense CONFIG --start CHECKPOINT --lr 6e-4 --out DIR
    python benchmarks/accuracy_study.py run CONFIG --start DIR/dense.pth --out DIR
    python benchmarks/accuracy_study.py report --out REPORT --study DIR BENCHMARK.json

``dense`` trains the dense original of a sparse config on, ``run`` fine-tunes the variants from it
and evaluates them, each with the programs of ``tools/``. A config with a ``DenseSparseSchedule``
is trained once for all ``--ratios``, each of which all sparse parts of the model then have, beside
models trained for each ratio alone. Every finished run leaves a JSON file; what has one is not run
again. ``report`` makes one file, tables and a plot of one or more studies
and of what ``tools/analysis_tools/benchmark.py`` measured for the config of each, with
``--parts whole``, better ``backbone whole``, and the keep ratios of the study.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope

from mmdynsparse.analysis import dense_config
from mmdynsparse.analysis.report import print_table, write_json

TOOLS = Path(__file__).resolve().parents[1] / 'tools'
RATIOS = (0.9, 0.7, 0.5)
# Where the controls of the recipe and the second seed belong.
MAIN_RATIO = 0.7
METRICS = {'mIoU': 'mIoU', 'coco/bbox_mAP': 'box AP', 'coco/segm_mAP': 'mask AP'}
ABLATIONS = ('no distillation', 'no ratio loss')
# Trained once for all keep ratios.
JOINT = ('joint', 'joint, random')
VARIANTS = ('dense', 'dense, fine-tuned', *JOINT, 'learned', 'random', *ABLATIONS)


class Variant(NamedTuple):
    """One model of the study.

    Attributes:
        name: One of ``VARIANTS``.
        ratio: Keep ratio of the backbone's first predictor, or None where the model is dense.
    """

    name: str
    ratio: float | None = None

    @property
    def is_dense(self) -> bool:
        """Whether the model is the dense original."""
        return self.ratio is None

    @property
    def training(self) -> str:
        """Name of the variant's training, one for all keep ratios if it is a joint one."""
        name = self.name.replace(', ', '-').replace(' ', '-')
        return name if self.is_dense or self.name in JOINT else f'{name}-{self.ratio}'

    @property
    def key(self) -> str:
        """Name of the variant's result."""
        return f'{self.training}-{self.ratio}' if self.name in JOINT else self.training


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of the three steps.

    Args:
        argv: Command line arguments. Defaults to None, those of the process.
    """
    args = parse_args(argv)
    dict(dense=train_dense, run=run_variants, report=report)[args.step](args)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    steps = parser.add_subparsers(dest='step', required=True)
    dense = steps.add_parser('dense', help='train the dense original on')
    run = steps.add_parser('run', help='fine-tune and evaluate the variants')
    for step in (dense, run):
        step.add_argument('config', type=Path, help='sparse config with the recipe')
        step.add_argument('--start', type=Path, required=True, help='checkpoint of a dense model')
        step.add_argument(
            '--iters',
            type=int,
            help="length; 0: evaluate as it is; defaults to the config's",
        )
        step.add_argument(
            '--cfg-options', nargs='+', action=DictAction, help='changes of the config'
        )
    dense.add_argument('--lr', type=float, required=True, help='highest learning rate')
    dense.add_argument('--prefix', help="load only these of the checkpoint's weights: 'backbone.'")
    run.add_argument('--seeds', type=int, nargs='+', default=[0], help='one training for each')
    run.add_argument(
        '--variants', nargs='+', help='only those whose key starts so, such as learned-0.7'
    )
    run.add_argument(
        '--ratios', type=float, nargs='+', default=RATIOS, help='keep ratios of the variants'
    )
    summary = steps.add_parser('report', help='table and plot of what has been run')
    summary.add_argument(
        '--study',
        nargs=2,
        type=Path,
        action='append',
        required=True,
        metavar=('DIR', 'BENCHMARK'),
        help='folder of a study and benchmark.json of its config',
    )
    for step in (dense, run, summary):
        step.add_argument('--out', type=Path, required=True, help='folder of the results')
    args = parser.parse_args(argv)
    files = {name: getattr(args, name, None) for name in ('config', 'start')}
    files |= {f'benchmark of {study}': path for study, path in getattr(args, 'study', ())}
    for name, path in files.items():
        if path is not None and not path.is_file():
            parser.error(f'{name} must be an existing file, got {path}')
    least = 1 if args.step == 'dense' else 0
    if getattr(args, 'iters', None) is not None and args.iters < least:
        parser.error(f'--iters must be at least {least}, got {args.iters}')
    if not all(0 < ratio <= 1 for ratio in getattr(args, 'ratios', ())):
        parser.error(f'--ratios must be in (0, 1], got {args.ratios}')
    return args


def variants(ratios: Sequence[float], joint: bool = False) -> Iterator[Variant]:
    """All models of a study, the important ones first."""
    yield Variant('dense')
    yield Variant('dense, fine-tuned')
    for name in JOINT if joint else ():
        for ratio in ratios:
            yield Variant(name, ratio)
    for ratio in sorted(ratios, key=lambda r: r != MAIN_RATIO):
        if ratio < 1:
            yield Variant('learned', ratio)
            yield Variant('random', ratio)
    for name in ABLATIONS:
        yield Variant(name, MAIN_RATIO)


def train_dense(args: argparse.Namespace) -> None:
    """Train the dense original without the hooks of the recipe."""
    cfg = as_dense(load_config(args.config, args.cfg_options))
    cfg.optim_wrapper.optimizer.lr = args.lr
    if args.prefix:
        part = cfg.model[args.prefix.rstrip('.')]
        part.init_cfg = dict(type='Pretrained', checkpoint=str(args.start), prefix=args.prefix)
    else:
        cfg.load_from = str(args.start)
    checkpoint = train(cfg, args.out / 'dense', args.iters, seed=0)
    shutil.copyfile(checkpoint, args.out / 'dense.pth')


def run_variants(args: argparse.Namespace) -> None:
    """Fine-tune and evaluate what is not there yet."""
    joint = bool(schedules(load_config(args.config, args.cfg_options)))
    known = list(variants(args.ratios, joint))
    wanted = [v for v in known if v.key.startswith(tuple(args.variants or ('',)))]
    if not wanted:
        keys = ', '.join(variant.key for variant in known)
        sys.exit(f'--variants must be beginnings of {keys}, got {" ".join(args.variants)}')
    for seed in args.seeds:
        for variant in wanted:
            path = args.out / f'{variant.key}_seed-{seed}.json'
            # Nothing of the dense model that is not trained depends on the seed.
            again = variant.name == 'dense' and seed != args.seeds[0]
            if not again and not path.exists():
                row = run_variant(variant, args, seed)
                write_json(row, path)
                print(json.dumps(row))


def run_variant(variant: Variant, args: argparse.Namespace, seed: int) -> dict:
    """Fine-tune and evaluate one variant and return its row of the table."""
    begin = time.time()
    cfg = load_config(args.config, args.cfg_options)
    cfg = as_dense(cfg) if variant.is_dense else as_sparse(cfg, variant)
    cfg.load_from = str(args.start)
    work_dir = args.out / f'{variant.training}_seed-{seed}'
    row = dict(variant=variant.name, ratio=variant.ratio, seed=seed, config=args.config.name)
    checkpoint = args.start
    if variant.name != 'dense' and args.iters != 0:
        checkpoint = trained(work_dir) if variant.name in JOINT else None
        checkpoint = checkpoint or train(cfg, work_dir, args.iters, seed)
        row |= training_summary(work_dir)
    metrics = evaluate(cfg, checkpoint, work_dir)
    # mmdet's are shares, mmseg's in percent.
    row['metrics'] = {
        METRICS[k]: 100 * v if k.startswith('coco') else v
        for k, v in metrics.items()
        if k in METRICS
    }
    row['keep_rates'] = [v for k, v in metrics.items() if k.startswith('eval_keep_rate_')]
    return row | dict(minutes=round((time.time() - begin) / 60, 1))


def load_config(path: Path, changes: Mapping | None = None) -> Config:
    """Load a config, change it and set the scope in which its types are looked up."""
    cfg = Config.fromfile(path)
    cfg.merge_from_dict(changes or {})
    init_default_scope(cfg.default_scope)
    return cfg


def as_dense(cfg: Config) -> Config:
    """The dense original of the model, trained as the recipe's pretrained parameters are."""
    cfg.model = dense_config(cfg.model).model
    cfg.custom_hooks = []
    paramwise = cfg.optim_wrapper.get('paramwise_cfg', {})
    cfg.optim_wrapper.optimizer.lr *= paramwise.pop('pretrained_lr_mult', 1.0)
    cfg.optim_wrapper.constructor = paramwise.pop('constructor', 'DefaultOptimWrapperConstructor')
    return cfg


def as_sparse(cfg: Config, variant: Variant) -> Config:
    """The config of a sparse variant."""
    parts = [p for p in cfg.model.values() if isinstance(p, dict) and p.get('sparsity')]
    joint = schedules(cfg)
    for part in parts if joint else [cfg.model.backbone]:
        ratio = part.sparsity.keep_ratio
        several = isinstance(ratio, list)
        part.sparsity.keep_ratio = [variant.ratio] * len(ratio) if several else variant.ratio
    if variant.name.endswith('random'):
        # Of the maps: random proposals would say nothing of where to compute.
        for part in parts:
            if part is not cfg.model.get('roi_head'):
                part.sparsity.selector = 'random'
    if variant.name not in JOINT:
        cfg.custom_hooks = [hook for hook in cfg.custom_hooks if hook not in joint]
    hooks = {hook.type.removeprefix('mmdynsparse.'): hook for hook in cfg.custom_hooks}
    if variant.name == 'no distillation':
        del hooks['DistillationHook']
    elif variant.name == 'no ratio loss':
        hooks['SparsityHook'].weight = 0.0  # it still measures keep rates
    cfg.custom_hooks = list(hooks.values())
    return cfg


def schedules(cfg: Config) -> list[dict]:
    """The hooks of a config that train it for all keep ratios."""
    return [hook for hook in cfg.custom_hooks if hook.type.endswith('DenseSparseSchedule')]


def train(cfg: Config, work_dir: Path, iters: int | None, seed: int) -> Path:
    """Train with ``tools/train.py`` and return the last checkpoint."""
    iters = iters or cfg.train_cfg.max_iters
    cfg.train_cfg.max_iters = iters
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None  # evaluated afterwards
    cfg.param_scheduler[-1].end = iters
    cfg.default_hooks.checkpoint.update(interval=iters, save_optimizer=False)
    cfg.default_hooks.logger.interval = 10
    cfg.randomness = dict(seed=seed)
    path = work_dir / 'config.py'
    work_dir.mkdir(parents=True, exist_ok=True)
    cfg.dump(path)
    call(work_dir / 'train.txt', 'train.py', path, '--work-dir', work_dir)
    return trained(work_dir)


def trained(work_dir: Path) -> Path | None:
    """The last checkpoint of a training, None if there is none."""
    file = work_dir / 'last_checkpoint'
    return Path(file.read_text().strip()) if file.exists() else None


def evaluate(cfg: Config, checkpoint: Path, work_dir: Path) -> dict:
    """Evaluate with ``tools/test.py`` and return the metrics that it wrote."""
    cfg.randomness = dict(seed=0)  # what random selection draws
    path = work_dir / 'config.py'
    work_dir.mkdir(parents=True, exist_ok=True)
    cfg.dump(path)
    call(work_dir / 'test.txt', 'test.py', path, checkpoint, '--work-dir', work_dir / 'test')
    return json.loads(max((work_dir / 'test').glob('*/*.json')).read_text())


def call(log: Path, *command: object) -> None:
    """Run a program of ``tools/``, its output in a file; one that fails ends the study."""
    command = [sys.executable, str(TOOLS / str(command[0])), *map(str, command[1:])]
    with log.open('w') as file:
        if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode:
            sys.exit(f'{Path(command[1]).name} failed, all its output is in {log}')


def training_summary(work_dir: Path) -> dict:
    """Mean losses of the first and the last fifth of a training and its last keep rates."""
    path = max(work_dir.glob('*/vis_data/scalars.json'))  # an interrupted run may have left others
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line for line in lines if 'loss' in line]
    part = max(len(lines) // 5, 1)
    names = [k for k in lines[-1] if k.startswith('keep_rate_')]
    return dict(
        iters=lines[-1]['step'],
        loss=[mean(lines[:part], 'loss'), mean(lines[-part:], 'loss')],
        sampled_keep_rates=[mean(lines[-part:], name) for name in names],
    )


def mean(lines: Sequence[Mapping], key: str) -> float:
    """Mean of one value of log lines."""
    return float(np.mean([line[key] for line in lines]))


def report(args: argparse.Namespace) -> None:
    """Print one line for each variant and write tables, all rows and a plot."""
    rows, table = [], []
    for folder, benchmark in args.study:
        found = [json.loads(path.read_text()) for path in sorted(folder.glob('*_seed-*.json'))]
        if not found:
            sys.exit(f'--study must hold results of the step run, got none in {folder}')
        rows += [dict(study=folder.name, **row) for row in found]
        table += summarize(folder.name, found, read_costs(benchmark))
    metrics = list(rows[0]['metrics'])
    write_json(dict(rows=rows, table=table), args.out / 'study.json')
    text = ''
    for title, header, lines in (accuracies(table, metrics), breakdowns(table)):
        print_table(title, header, lines)
        lines = [header, ['---'] * len(header), *lines]
        text += f'{title}\n\n' + ''.join('| ' + ' | '.join(line) + ' |\n' for line in lines) + '\n'
    (args.out / 'study.md').write_text(text)
    plot(table, metrics[0], args.out / 'accuracy-latency.png')


def read_costs(path: Path) -> dict[float | None, dict]:
    """Multiply-adds, latency and its breakdown by the first keep ratio, None for dense."""
    costs = defaultdict(dict)
    for row in json.loads(path.read_text())['rows']:
        ratio, part = next(iter(row['keep_ratios']), None), row['part']
        costs[ratio][f'GMACs {part}'] = row['gmacs']
        costs[ratio][f'ms {part}'] = row['median']
        costs[ratio][f'speed-up {part}'] = row['speed_up']
        costs[ratio][f'breakdown {part}'] = row['breakdown']
        costs[ratio][f'dense breakdown {part}'] = costs[None][f'breakdown {part}']
    return dict(costs)


def summarize(study: str, rows: Sequence[Mapping], costs: Mapping) -> list[dict]:
    """The results of each variant, one value for each seed, in the order of ``VARIANTS``."""
    groups = defaultdict(list)
    for row in rows:
        groups[Variant(row['variant'], row['ratio'])].append(row)
    table = []
    for variant in sorted(groups, key=lambda v: (VARIANTS.index(v.name), v.ratio or 0)):
        group = groups[variant]
        metrics = {k: [row['metrics'][k] for row in group] for k in group[0]['metrics']}
        rates = np.mean([row['keep_rates'] for row in group], axis=0).tolist()
        line = dict(study=study, variant=variant.name, ratio=variant.ratio, metrics=metrics)
        table.append(line | dict(keep_rates=rates, costs=costs.get(variant.ratio, {})))
    return table


def accuracies(
    table: Sequence[Mapping], metrics: Sequence[str]
) -> tuple[str, list[str], list[list[str]]]:
    """Title, header and lines of the table of all variants, one value for each seed."""
    measured = {key for line in table for key in line['costs']}
    parts = [part for part in ('backbone', 'whole') if f'GMACs {part}' in measured]
    header = ['study', 'variant', 'keep ratio', *metrics, 'kept']
    header += [f'GMACs {part}' for part in parts] + [f'{part}, ms' for part in parts]
    lines = []
    for line in table:
        costs = line['costs']
        cells = [line['study'], line['variant'], ratio_cell(line)]
        cells += [', '.join(f'{round(v, 2)}' for v in line['metrics'][k]) for k in metrics]
        cells.append(' '.join(f'{rate:.2f}' for rate in line['keep_rates']))
        cells += [f'{costs[f"GMACs {part}"]:.2f}' if costs else '' for part in parts]
        cells += [
            f'{costs[f"ms {part}"]:.0f} ({costs[f"speed-up {part}"]:.2f} x)' if costs else ''
            for part in parts
        ]
        lines.append(cells)
    return 'Accuracy and cost', header, lines


def breakdowns(table: Sequence[Mapping]) -> tuple[str, list[str], list[list[str]]]:
    """Title, header and lines of where the time of the whole models goes, dense -> sparse."""
    lines = {}
    for line in [line for line in table if line['costs'] and line['ratio'] is not None]:
        before, after = (line['costs'][f'{key}breakdown whole'] for key in ('dense ', ''))
        split = {part: f'{before[part]:.0f} -> {after[part]:.0f}' for part in before}
        lines[line['study'], ratio_cell(line)] = split
    parts = list(next(iter(lines.values()), {}))
    cells = [[*place, *(line[part] for part in parts)] for place, line in lines.items()]
    return 'Profiled time, ms, dense -> sparse', ['study', 'keep ratio', *parts], cells


def ratio_cell(line: Mapping) -> str:
    """The keep ratio of a line of the table as text."""
    return '' if line['ratio'] is None else str(line['ratio'])


def plot(table: Sequence[Mapping], metric: str, path: Path) -> None:
    """Draw accuracy against the whole model's latency, over the dense one's in the same run."""
    figure = Figure(figsize=(7, 5))
    axes = figure.add_subplot()
    # A colour for each study, a marker for each variant.
    studies = list(dict.fromkeys(line['study'] for line in table))
    markers = dict(zip(VARIANTS, 's*Pdo^vX', strict=True))
    groups = defaultdict(list)
    for line in table:
        if line['costs']:
            # Milliseconds of different runs differ by more than some variants do.
            point = 1 / line['costs']['speed-up whole'], float(np.mean(line['metrics'][metric]))
            groups[line['study'], line['variant']].append((*point, line['ratio']))
    for (study, variant), points in groups.items():
        points = sorted(points)
        xs, ys, _ = zip(*points, strict=True)
        style = dict(color=f'C{studies.index(study)}', marker=markers[variant])
        axes.plot(xs, ys, label=f'{study}: {variant}', markersize=7, **style)
        for x, y, ratio in points:
            if ratio is not None:
                axes.annotate(f' {ratio}', (x, y))
    axes.set(xlabel='latency of the whole model / that of the dense one', ylabel=metric)
    axes.legend(loc='upper left', bbox_to_anchor=(1.02, 1))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches='tight')


if __name__ == '__main__':
    main()
