"""Train a small sparse model on generated data and set it beside a dense one.

Everything is written below the current directory: the data in ``data/quickstart``, the rest in
``work_dirs/quickstart-seg`` or ``work_dirs/quickstart-det``.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import load_checkpoint
from PIL import Image
from rich.console import Console
from rich.table import Table

from mmdynsparse.analysis import compare_latency, count_macs
from mmdynsparse.datasets import write_scenes
from mmdynsparse.visualization import draw_keep_maps

ROOT = Path(__file__).resolve().parents[1]
DATA = Path('data/quickstart')
NUM_TRAIN, NUM_VAL = 200, 40
NUM_PICTURED = 4
ROUNDS = 40
METHODS = dict(seg='upernet', det='mask-rcnn')
METRICS = dict(  # name in the table and name in the metrics that tools/test.py writes
    seg={'mIoU (%)': 'mIoU'},
    det={'box AP': 'coco/bbox_mAP', 'mask AP': 'coco/segm_mAP'},
)
TRAIN_LINE = re.compile(r'Iter\(train\) \[ *(\d+/\d+)\].* eta: (\S+) .* loss: (\S+)')
TEST_LINE = re.compile(r'Iter\((?:val|test)\) \[ *(\d+/\d+)\] +eta: ')
KEEP_RATE = re.compile(r'keep_rate_\d+: (\S+)')


class Row(NamedTuple):
    """One line of the result table; ``dense`` is None where only the sparse model has a value."""

    name: str
    dense: float | None
    sparse: float
    remark: str = ''


def main() -> None:
    """Run all steps; the first that fails ends the program with its message."""
    args = parse_args()
    begin = time.time()
    work_dir = Path('work_dirs') / f'quickstart-{args.task}'
    clean(work_dir)

    print(f'[1/6] data: {NUM_TRAIN} training and {NUM_VAL} validation scenes in {DATA}')
    try:
        write_scenes(DATA, NUM_TRAIN, NUM_VAL)
    except OSError as error:
        sys.exit(f'quickstart: cannot write the data: {error}')

    method = METHODS[args.task]
    configs = {
        'dense': ROOT / f'configs/quickstart/swin-xt_{method}_quickstart.py',
        'sparse': ROOT / f'configs/quickstart/sparse-swin-xt_{method}_quickstart.py',
    }
    options = []
    if args.iters:
        options = [f'train_cfg.max_iters={args.iters}', f'train_cfg.val_interval={args.iters}']
    print('[2/6] train a dense model, where both others start')
    start = train(configs['dense'], work_dir / 'start', options)
    checkpoints = {}
    for step, (name, config) in enumerate(configs.items(), 3):
        print(f'[{step}/6] fine-tune the {name} model')
        checkpoints[name] = train(config, work_dir / name, [*options, f'load_from={start}'])
    print('[5/6] evaluate both')
    metrics = {name: test(configs[name], checkpoints[name], work_dir / name) for name in configs}

    print('[6/6] keep maps, multiply-adds and latency')
    models = {name: load_model(configs[name], checkpoints[name]) for name in configs}
    batches = load_batches(configs['sparse'], models['sparse'])
    labels = location_labels(configs['sparse'])
    save_keep_maps(models['sparse'], batches, labels, work_dir / 'keep_maps.png')
    rows = [
        *accuracy_rows(metrics, METRICS[args.task]),
        *keep_rate_rows(metrics['sparse'], models['sparse'], labels),
        *cost_rows(models, batches),
    ]
    report(rows, conditions(checkpoints['sparse'], batches), work_dir)
    print(f'\nmodel     {checkpoints["sparse"]}')
    print(f'pictures  {work_dir / "keep_maps.png"}')
    print(f'table     {work_dir / "table.md"}, {work_dir / "table.json"}')
    print(f'took {(time.time() - begin) / 60:.1f} minutes')


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('task', choices=tuple(METHODS), help='segmentation or detection')
    parser.add_argument(
        '--iters', type=int, help="length of each training; defaults to the config's, for trials"
    )
    args = parser.parse_args()
    if args.iters is not None and args.iters < 1:
        parser.error(f'--iters must be at least 1, got {args.iters}')
    return args


def clean(work_dir: Path) -> None:
    """Remove what an earlier run left, and nothing else."""
    for name in ('start', 'dense', 'sparse'):
        shutil.rmtree(work_dir / name, ignore_errors=True)
    for name in ('keep_maps.png', 'table.md', 'table.json'):
        (work_dir / name).unlink(missing_ok=True)


def train(config: Path, work_dir: Path, options: list[str]) -> Path:
    """Train with ``tools/train.py`` and return the path of the last checkpoint."""
    command = ['train.py', config, '--work-dir', work_dir]
    run(command + (['--cfg-options', *options] if options else []), work_dir / 'train.txt')
    return Path(os.path.relpath((work_dir / 'last_checkpoint').read_text().strip()))


def test(config: Path, checkpoint: Path, work_dir: Path) -> dict:
    """Evaluate with ``tools/test.py`` and return the metrics it wrote."""
    run(['test.py', config, checkpoint, '--work-dir', work_dir / 'test'], work_dir / 'test.txt')
    return json.loads(max((work_dir / 'test').glob('*/*.json')).read_text())


def run(command: list, log: Path) -> None:
    """Run a program of tools/: all its output goes to ``log``, its progress to the terminal."""
    command = [sys.executable, '-u', str(ROOT / 'tools' / command[0]), *map(str, command[1:])]
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open('w') as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        for line in process.stdout:
            file.write(line)
            if progress := describe(line):
                print(f'      {progress}', flush=True)
    if process.returncode:
        tail = ''.join(log.read_text().splitlines(keepends=True)[-15:])
        sys.exit(f'{tail}\nquickstart: {Path(command[2]).name} failed, all its output is in {log}')


def describe(line: str) -> str:
    """Shorten a progress line of mmengine's log; other lines give an empty string."""
    if match := TRAIN_LINE.search(line):
        rates = ' '.join(f'{float(rate):.2f}' for rate in KEEP_RATE.findall(line))
        iteration, eta, loss = match.groups()
        rates = f'  keep rates {rates}' if rates else ''
        return f'train {iteration:>9}  loss {float(loss):.3f}{rates}  {eta} left'
    if match := TEST_LINE.search(line):
        return f'evaluate {match.group(1)}'
    return ''


def load_model(config: Path, checkpoint: Path) -> torch.nn.Module:
    """Build the model of a config with its trained weights, in eval mode on the CPU."""
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    load_checkpoint(model, str(checkpoint), map_location='cpu', strict=True, logger='silent')
    model.eval()
    return model


def load_batches(config: Path, model: torch.nn.Module) -> list[dict]:
    """Load validation images spread over the set, one per batch, normalised for the model.

    Each batch is what the data preprocessor returns plus ``image``, (H, W, 3) uint8 RGB.
    """
    dataset = DATASETS.build(Config.fromfile(config).val_dataloader.dataset)
    batches = []
    for i in np.linspace(0, len(dataset) - 1, NUM_PICTURED, dtype=int):
        item = dataset[int(i)]
        image = item['inputs'].numpy()[::-1].transpose(1, 2, 0)
        batches.append(dict(model.data_preprocessor(pseudo_collate([item])), image=image))
    return batches


def location_labels(config: Path) -> list[str]:
    """Name the position of each predictor, in the order of the decisions."""
    locations = Config.fromfile(config).model.backbone.sparsity.locations
    return [f'stage {stage} block {block}' for stage in locations for block in locations[stage]]


def save_keep_maps(
    model: torch.nn.Module, batches: list[dict], labels: list[str], path: Path
) -> None:
    """Write one row of panels per image: the image and what each predictor keeps of it."""
    rows = []
    for batch in batches:
        with torch.no_grad():
            model.backbone(batch['inputs'])
        rows.append(draw_keep_maps(batch['image'], model.backbone.decisions, 0, labels))
    Image.fromarray(np.concatenate(rows)).save(path)


def accuracy_rows(metrics: dict, names: dict) -> list[Row]:
    """Accuracies on the validation set."""
    return [Row(k, metrics['dense'][v], metrics['sparse'][v]) for k, v in names.items()]


def keep_rate_rows(metrics: dict, model: torch.nn.Module, labels: list[str]) -> list[Row]:
    """Keep rates measured by tools/test.py over the validation set."""
    return [
        Row(
            f'keep rate {label}',
            None,
            metrics[f'eval_keep_rate_{i}'],
            f'target {decision.ratio:.2f}',
        )
        for i, (label, decision) in enumerate(zip(labels, model.backbone.decisions, strict=True))
    ]


def cost_rows(models: dict, batches: list[dict]) -> list[Row]:
    """GMACs (mean over the batches) and median latency of backbone and whole model."""
    calls = {}
    for name, model in models.items():
        calls['backbone', name] = lambda batch, model=model: model.backbone(batch['inputs'])
        calls['model', name] = lambda batch, model=model: model(
            batch['inputs'], batch['data_samples'], mode='predict'
        )
    gmacs = {
        key: float(np.mean([count_macs(call, batch) for batch in batches])) / 1e9
        for key, call in calls.items()
    }
    latency = compare_latency(
        {key: over_batches(call, batches) for key, call in calls.items()}, ROUNDS
    )
    rows = []
    for part in ('backbone', 'model'):
        dense, sparse = gmacs[part, 'dense'], gmacs[part, 'sparse']
        rows.append(Row(f'GMACs {part}', dense, sparse, f'{sparse / dense:.2f} of dense'))
    for part in ('backbone', 'model'):
        dense, sparse = latency[part, 'dense'].median, latency[part, 'sparse'].median
        word = 'faster' if sparse < dense else 'slower'
        rows.append(Row(f'latency {part} (ms)', dense, sparse, f'{dense / sparse:.2f} x, {word}'))
    return rows


def over_batches(call, batches: list[dict]):
    """Return a function without arguments that goes round the batches, one per call."""
    cycle = itertools.cycle(batches)
    return lambda: call(next(cycle))


def conditions(checkpoint: Path, batches: list[dict]) -> list[str]:
    """State how the numbers came about."""
    height, width = batches[0]['inputs'].shape[-2:]
    iters = checkpoint.stem.removeprefix('iter_')
    return [
        f'GMACs and latency: CPU, {torch.get_num_threads()} threads, float32, batch 1, '
        f'{height} x {width} px, torch {torch.__version__}; dense and sparse alternate, '
        f'median of {ROUNDS} calls on {len(batches)} images; predictors and gathering included.',
        f'Accuracy: both models were fine-tuned for {iters} iterations from one dense checkpoint '
        'with the same settings and seed; one run each, on a small generated set.',
        'At this size calls cost as much as arithmetic; `make benchmark` times real sizes. '
        'The heads of a detector run on as many detections as the model makes.',
    ]


def report(rows: list[Row], notes: list[str], work_dir: Path) -> None:
    """Print the table and write it as Markdown and JSON."""
    header = ('', 'dense', 'sparse', '')
    cells = [
        (
            row.name,
            '-' if row.dense is None else f'{row.dense:.3f}',
            f'{row.sparse:.3f}',
            row.remark,
        )
        for row in rows
    ]
    table = Table(*header, title='sparse beside dense')
    for line in cells:
        table.add_row(*line)
    Console().print(table)
    print('\n'.join(notes))

    lines = [header, ('---', '---:', '---:', '---'), *cells]
    markdown = '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)
    (work_dir / 'table.md').write_text(markdown + '\n\n' + '\n\n'.join(notes) + '\n')
    result = dict(rows=[row._asdict() for row in rows], notes=notes)
    (work_dir / 'table.json').write_text(json.dumps(result, indent=2))


if __name__ == '__main__':
    main()
