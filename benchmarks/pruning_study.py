"""What pruning (SPViT) costs in accuracy on CamVid, beside the controls.

    python benchmarks/pruning_study.py run --search CONFIG --finetune CONFIG --sparse CONFIG \
        --start CHECKPOINT --out DIR
    python benchmarks/pruning_study.py report --out REPORT --study DIR

``run`` searches for each target, prunes, fine-tunes and evaluates, each with the programs of
``tools/``. Controls of the same multiply-adds have the same weights at the start and the same
fine-tuning: ``uniform`` keeps all attentions and the same share of each FFN, the hidden units with
the largest norms; ``random`` has random gates. ``sparse`` makes fine-tuned models sparse. Every
finished run leaves a JSON file; what has one is not run again.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.config import Config
from mmengine.registry import MODELS

sys.path.insert(0, str(Path(__file__).parent))
from accuracy_study import METRICS, call, evaluate, load_config, train, trained, training_summary

from mmdynsparse.analysis import architecture_macs
from mmdynsparse.analysis.report import print_table, write_json
from mmdynsparse.engine.architecture_cost import (
    GatedBlock,
    as_string,
    dense_cost,
    gated_blocks,
    macs_table,
    meet_cost,
    spread_units,
)

DENSE = 'dense, fine-tuned'
SEARCHED, UNIFORM, RANDOM = 'searched', 'uniform', 'random'
# With the weights of the search, in place of those before it.
CONTINUED = 'searched, its weights'
SPARSE = 'searched, sparse'
DENSE_SPARSE = 'dense, sparse'
NAMES = (DENSE, SEARCHED, UNIFORM, RANDOM, CONTINUED, DENSE_SPARSE, SPARSE)
# How far the cost of a control may be from that of the searched model, as a share.
TOLERANCE = 0.01


class Variant(NamedTuple):
    """One model of the study.

    Attributes:
        name: One of ``NAMES``.
        target: Share of the dense backbone's multiply-adds, or None where nothing is pruned.
    """

    name: str
    target: float | None = None

    @property
    def key(self) -> str:
        """Name of the variant's files."""
        name = self.name.replace(', ', '-').replace(' ', '-')
        return name if self.target is None else f'{name}-{self.target}'


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of the two steps.

    Args:
        argv: Command line arguments. Defaults to None, those of the process.
    """
    args = parse_args(argv)
    dict(run=run_variants, report=report)[args.step](args)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    steps = parser.add_subparsers(dest='step', required=True)
    run = steps.add_parser('run', help='search, prune, fine-tune and evaluate')
    for name in ('search', 'finetune', 'sparse'):
        run.add_argument(f'--{name}', type=Path, required=True, help=f'config of the step {name}')
    run.add_argument('--start', type=Path, required=True, help='checkpoint of the dense model')
    run.add_argument('--targets', type=float, nargs='+', default=[0.75, 0.5])
    run.add_argument('--seeds', type=int, nargs='+', default=[0])
    run.add_argument('--variants', nargs='+', help='only those whose key starts so: searched-0.5')
    run.add_argument(
        '--iters', type=int, help="length of each fine-tuning; defaults to the configs'"
    )
    summary = steps.add_parser('report', help='table of what has been run')
    summary.add_argument('--study', type=Path, required=True, help='folder of a study')
    for step in (run, summary):
        step.add_argument('--out', type=Path, required=True, help='folder of the results')
    args = parser.parse_args(argv)
    for name in ('search', 'finetune', 'sparse', 'start'):
        path = getattr(args, name, None)
        if path is not None and not path.is_file():
            parser.error(f'--{name} must be an existing file, got {path}')
    if not all(0 < target < 1 for target in getattr(args, 'targets', ())):
        parser.error(f'--targets must be in (0, 1), got {args.targets}')
    if getattr(args, 'iters', None) is not None and args.iters < 1:
        parser.error(f'--iters must be at least 1, got {args.iters}')
    return args


def variants(targets: Sequence[float]) -> Iterator[Variant]:
    """All models of a study, the important ones first."""
    yield Variant(DENSE)
    for target in targets:
        for name in (SEARCHED, UNIFORM, RANDOM):
            yield Variant(name, target)
    for target in targets:
        yield Variant(CONTINUED, target)
    yield Variant(DENSE_SPARSE)
    for target in targets:
        yield Variant(SPARSE, target)


def run_variants(args: argparse.Namespace) -> None:
    """Run what is not there yet."""
    known = list(variants(args.targets))
    wanted = [v for v in known if v.key.startswith(tuple(args.variants or ('',)))]
    if not wanted:
        keys = ', '.join(variant.key for variant in known)
        sys.exit(f'--variants must be beginnings of {keys}, got {" ".join(args.variants)}')
    for seed in args.seeds:
        for variant in wanted:
            path = args.out / f'{variant.key}_seed-{seed}.json'
            if not path.exists():
                row = run_variant(variant, args, seed)
                write_json(row, path)
                print(json.dumps(row), flush=True)


def run_variant(variant: Variant, args: argparse.Namespace, seed: int) -> dict:
    """Fine-tune and evaluate one variant and return its row of the table."""
    begin, work_dir = time.time(), args.out / f'{variant.key}_seed-{seed}'
    if variant.name in (SPARSE, DENSE_SPARSE):
        before = Variant(SEARCHED if variant.target else DENSE, variant.target)
        folder = args.out / f'{before.key}_seed-{seed}'
        if (checkpoint := trained(folder)) is None:
            sys.exit(f'{variant.key} needs the model of {before.key}, run that first')
        cfg = load_config(args.sparse)
        if variant.target:
            cfg.model.backbone.pruning = load_config(folder / 'config.py').model.backbone.pruning
        cfg.load_from = str(checkpoint)
    elif variant.target is None:
        cfg = load_config(args.finetune)
        cfg.load_from = str(args.start)
    else:
        cfg = load_config(pruned(variant, args, seed))
    checkpoint = train(cfg, work_dir, args.iters, seed)
    metrics = evaluate(cfg, checkpoint, work_dir)
    row = dict(variant=variant.name, target=variant.target, seed=seed, config=args.finetune.name)
    row |= dict(training_summary(work_dir), **cost(cfg, args))
    row['metrics'] = {METRICS[k]: v for k, v in metrics.items() if k in METRICS}
    if variant.name in (SEARCHED, CONTINUED):
        row['search'] = search_summary(searched(variant.target, args, seed))
    return row | dict(minutes=round((time.time() - begin) / 60, 1))


def pruned(variant: Variant, args: argparse.Namespace, seed: int) -> Path:
    """Write a pruned model, unless it is there, and return its config."""
    out = args.out / f'{variant.key}_seed-{seed}_pruned'
    if not (out / 'pruned.py').exists():
        if variant.name in (UNIFORM, RANDOM):
            gates = out.with_name(f'{out.name}.pth')
            write_control(variant, args, seed, gates)
        else:
            gates = searched(variant.target, args, seed)
        command = [args.search, gates, '--finetune', args.finetune, '--out', out]
        if variant.name != CONTINUED:
            command += ['--weights', 'original', '--original', args.start]
        log = out.with_name(f'{out.name}.txt')
        call(log, 'model_converters/prune_checkpoint.py', *command)
    return out / 'pruned.py'


def searched(target: float, args: argparse.Namespace, seed: int) -> Path:
    """Search, unless it is done, and return the checkpoint."""
    work_dir = args.out / f'search-{target}_seed-{seed}'
    if not (work_dir / 'searched.pth').exists():
        cfg = load_config(args.search)
        cfg.load_from = str(args.start)
        search_hook(cfg).target = target
        train(cfg, work_dir, None, seed)
    return work_dir / 'searched.pth'


def search_summary(checkpoint: Path) -> dict:
    """Where a search ended, and the share of the dense cost at each line of its log."""
    work_dir = checkpoint.parent
    found = json.loads((work_dir / 'architecture.json').read_text())
    path = max(work_dir.glob('*/vis_data/scalars.json'))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    shares = {line['step']: round(line['cost_share'], 4) for line in lines if 'cost_share' in line}
    return dict(iters=found['iteration'], share=found['share'], shares=shares)


def search_hook(cfg: Config) -> dict:
    """The search hook of a config."""
    return next(h for h in cfg.custom_hooks if h.type.endswith('SinglePathSearchHook'))


def image_size(cfg: Config) -> tuple[int, int]:
    """Size in px that the costs of a search are for."""
    return tuple(search_hook(cfg).get('shape') or cfg.model.data_preprocessor.size)


def write_control(variant: Variant, args: argparse.Namespace, seed: int, path: Path) -> None:
    """Write the checkpoint of a search that had chosen the gates of a control."""
    cfg = load_config(args.search)
    model = MODELS.build(cfg.model)
    state = torch.load(args.start, map_location='cpu', weights_only=True)
    model.load_state_dict(state.get('state_dict', state), strict=False)
    blocks = gated_blocks(model.backbone)
    table = macs_table(model.backbone.geometry, image_size(cfg))
    goal = variant.target * dense_cost(blocks, table)
    set_gates(blocks, variant.name, seed)
    got = meet_cost(blocks, table, goal)
    if abs(got - goal) > TOLERANCE * goal:
        sys.exit(f'--targets must be within reach of {variant.name} pruning, got {variant.target}')
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state_dict=model.state_dict()), path)


@torch.no_grad()
def set_gates(blocks: Sequence[GatedBlock], name: str, seed: int) -> None:
    """Set the gates of a control, before they are shifted to a cost.

    Args:
        blocks: From ``gated_blocks``.
        name: ``UNIFORM`` or ``RANDOM``.
        seed: Of the random gates.
    """
    generator = torch.Generator().manual_seed(seed)
    for block in blocks:
        if name == RANDOM:
            for logits in (block.mixer.gate_logits, block.ffn.gate_logits):
                logits.copy_(torch.randn(logits.shape, generator=generator))
        else:
            block.mixer.gate_logits.fill_(100.0)  # the last ones to close
            block.ffn.gate_logits.fill_(0.0)
    if name == UNIFORM:
        spread_units(blocks, 1.0)


def cost(cfg: Config, args: argparse.Namespace) -> dict:
    """GMACs of the backbone at the size of the search, without sparsity, and its architecture."""
    backbone = {k: v for k, v in cfg.model.backbone.items() if k != 'sparsity'}
    hw = image_size(load_config(args.search))
    gmacs = architecture_macs(backbone, hw) / 1e9
    dense = architecture_macs({**backbone, 'pruning': None}, hw) / 1e9
    pruning = backbone.get('pruning') or {}
    mixers = as_string(pruning['mixers']) if 'mixers' in pruning else ''
    return dict(
        gmacs=gmacs, share=gmacs / dense, mixers=mixers, hidden=list(pruning.get('hidden', []))
    )


def report(args: argparse.Namespace) -> None:
    """Print the table and write it, with all rows."""
    rows = [json.loads(path.read_text()) for path in sorted(args.study.glob('*_seed-*.json'))]
    if not rows:
        sys.exit(f'--study must hold results of the step run, got none in {args.study}')
    header, lines = table_of(rows)
    title = 'Accuracy and cost of pruned backbones'
    print_table(title, header, lines)
    marked = [header, ['---'] * len(header), *lines]
    text = ''.join('| ' + ' | '.join(line) + ' |\n' for line in marked)
    write_json(dict(rows=rows), args.out / 'study.json')
    (args.out / 'study.md').write_text(f'{title}\n\n{text}')


def table_of(rows: Sequence[Mapping]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the table, one value for each seed."""
    groups = defaultdict(list)
    for row in rows:
        groups[row['variant'], row['target']].append(row)
    metrics = list(rows[0]['metrics'])
    header = ['variant', 'target', *metrics, 'GMACs backbone', 'share', 'blocks']
    lines = []
    for name, target in sorted(groups, key=lambda k: (-(k[1] or 1), NAMES.index(k[0]))):
        group = sorted(groups[name, target], key=lambda row: row['seed'])
        line = [name, '' if target is None else str(target)]
        line += [', '.join(f'{row["metrics"][metric]:.2f}' for row in group) for metric in metrics]
        line += [', '.join(f'{row[k]:.3f}' for row in group) for k in ('gmacs', 'share')]
        lines.append([*line, ', '.join(f'`{row["mixers"]}`' for row in group if row['mixers'])])
    return header, lines


if __name__ == '__main__':
    main()
