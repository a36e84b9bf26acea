"""Make a small dense model sparse, from the data to the pictures, and say what it gains.

Every step is a command of tools/ and is printed, so that you can do the same with your own model.
All is written below the current directory: the data in ``data/quickstart``, the rest in
``work_dirs/quickstart-seg`` or ``work_dirs/quickstart-det``.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
from mmengine.config import Config
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mmdynsparse.datasets import CLASSES, write_scenes

TOOLS = Path(__file__).resolve().parent
DATA = Path('data/quickstart')
SIZE = 512  # px
NUM_TRAIN, NUM_VAL = 160, 40
PARTS = 8  # of the validation set, from which the noise of accuracies is estimated
NUM_PICTURED = 4
ROUNDS = 20
FINE_TUNING = 0.35  # of the length of the dense training, which is short
PRETRAINED_LR = 4e-4  # of pretrained parameters in the fine-tuning, a fifth of the config's


class Task(NamedTuple):
    """What differs between segmentation and detection.

    Attributes:
        config: The dense config.
        metrics: Name in the table and name in the metrics that ``tools/test.py`` writes.
        dump: Arguments of ``tools/test.py`` that write the predictions below a folder {}.
        fine_tunes: Whether the sparse model is fine-tuned. What a detector gains most by, fewer
            proposals and lighter masks, needs no training.
    """

    config: Path
    metrics: dict[str, str]
    dump: tuple[str, ...]
    fine_tunes: bool = True


CONFIGS = TOOLS.parent / 'configs/quickstart'
TASKS = dict(
    seg=Task(
        CONFIGS / 'swin-xt_upernet_quickstart.py', {'mIoU (%)': 'mIoU'}, ('--out', '{}/predictions')
    ),
    det=Task(
        CONFIGS / 'swin-xt_mask-rcnn_quickstart.py',
        {'box AP': 'coco/bbox_mAP', 'mask AP': 'coco/segm_mAP'},
        ('--cfg-options', 'test_evaluator.outfile_prefix={}/predictions/coco'),
        fine_tunes=False,
    ),
)
PROGRESS = re.compile(r'Iter\((train|val|test)\) \[ *(\d+)/(\d+)\]')
LOSS = re.compile(r' loss: (\S+)')


class Row(NamedTuple):
    """One line of the table; ``dense`` is None where only the sparse model has a value."""

    name: str
    dense: float | None
    sparse: float
    remark: str = ''


def main() -> None:
    """Run all steps; the first that fails ends the program with its message."""
    args = parse_args()
    begin = time.time()
    sys.stdout.reconfigure(line_buffering=True)  # in the order of what the tools print
    task = TASKS[args.task]
    work_dir = Path('work_dirs') / f'quickstart-{args.task}'
    clean(work_dir)

    print(f'[1/7] data: {NUM_TRAIN} training and {NUM_VAL} validation scenes in {DATA}')
    try:
        write_scenes(DATA, NUM_TRAIN, NUM_VAL, (SIZE, SIZE))
    except OSError as error:
        sys.exit(f'quickstart: cannot write the data: {error}')

    print('[2/7] train a dense model (of your own you have one already)')
    changes = [f'train_cfg.max_iters={args.iters}'] if args.iters else []
    start = train(task.config, work_dir / 'dense', changes)
    length = 0
    if task.fine_tunes:
        length = max(round(FINE_TUNING * int(start.stem.removeprefix('iter_'))), 1)

    print('[3/7] make its config sparse')
    sparse = work_dir / 'sparse.py'
    how = ['--length', length] if task.fine_tunes else ['--no-training']
    run(['sparsify.py', task.config, start, *how, '--size', SIZE, '-o', sparse])

    models = dict(sparse=(sparse, start), dense=(task.config, start))
    if task.fine_tunes:
        print('[4/7] fine-tune the sparse model')
        models['sparse'] = sparse, train(sparse, work_dir / 'sparse', [])
        print('[5/7] fine-tune the dense model as long, to compare')
        models['dense'] = task.config, train(sparse, work_dir / 'control', control_options(sparse))
    else:
        print('[4/7] [5/7] nothing to fine-tune: both have the weights of the dense model')

    print('[6/7] evaluate both')
    metrics = {
        name: test(*model, work_dir / f'test-{name}', task) for name, model in models.items()
    }

    print('[7/7] measure and draw the sparse model')
    images = sorted((DATA / 'images/val').glob('*.jpg'))[:: NUM_VAL // NUM_PICTURED]
    costs = benchmark(*models['sparse'], images[0], work_dir / 'benchmark')
    pictures = work_dir / 'pictures'
    run(['demo.py', *images, *models['sparse'], '--keep-maps', '--out', pictures], pictures)

    errors = standard_errors(args.task, work_dir)
    rows = accuracy_rows(metrics, task.metrics, errors)
    rows += [*keep_rate_rows(metrics['sparse'], costs), *cost_rows(costs)]
    report(rows, conditions(length, costs, images[0]), work_dir)
    print(f'\npictures  {pictures}\ntable     {work_dir / "table.md"}, {work_dir / "table.json"}')
    print(f'took {(time.time() - begin) / 60:.1f} minutes')


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('task', choices=tuple(TASKS), help='segmentation or detection')
    parser.add_argument(
        '--iters',
        type=int,
        help="length of the dense training; defaults to the config's, for trials",
    )
    args = parser.parse_args()
    if args.iters is not None and args.iters < 1:
        parser.error(f'--iters must be at least 1, got {args.iters}')
    return args


def clean(work_dir: Path) -> None:
    """Remove what an earlier run left, and nothing else."""
    folders = ('dense', 'sparse', 'control', 'test-dense', 'test-sparse', 'benchmark', 'pictures')
    for name in folders:
        shutil.rmtree(work_dir / name, ignore_errors=True)
    for name in ('sparse.py', 'table.md', 'table.json'):
        (work_dir / name).unlink(missing_ok=True)


def train(config: Path, work_dir: Path, changes: list[str]) -> Path:
    """Train with ``tools/train.py`` and return the path of the last checkpoint."""
    command = ['train.py', config, '--work-dir', work_dir]
    run(command + (['--cfg-options', *changes] if changes else []), work_dir)
    return Path(os.path.relpath((work_dir / 'last_checkpoint').read_text().strip()))


def control_options(sparse: Path) -> list[str]:
    """Return what trains the dense model alike: no sparsity, no hooks, the same learning rate."""
    model = Config.fromfile(sparse).model
    parts = [key for key, part in model.items() if isinstance(part, dict) and 'sparsity' in part]
    return [
        *(f'model.{part}.sparsity=None' for part in parts),
        'custom_hooks=[]',
        'optim_wrapper.constructor=DefaultOptimWrapperConstructor',
        f'optim_wrapper.optimizer.lr={PRETRAINED_LR}',
    ]


def test(config: Path, checkpoint: Path, work_dir: Path, task: Task) -> dict:
    """Evaluate with ``tools/test.py``, which writes predictions, and return the metrics."""
    dump = [text.format(work_dir) for text in task.dump]
    run(['test.py', config, checkpoint, '--work-dir', work_dir, *dump], work_dir)
    return json.loads(max(work_dir.glob('*/[0-9]*.json')).read_text())


def benchmark(config: Path, checkpoint: Path, image: Path, work_dir: Path) -> dict:
    """Time the whole model, and return what ``tools/analysis_tools/benchmark.py`` writes."""
    command = ['analysis_tools/benchmark.py', config, checkpoint, '--parts', 'backbone', 'whole']
    command += ['--sizes', SIZE, '--image', image, '--rounds', ROUNDS, '--out', work_dir]
    run(command, work_dir)
    return json.loads((work_dir / 'benchmark.json').read_text())


def run(command: list, folder: Path | None = None) -> None:
    """Run a program of tools/.

    Args:
        command: Its name and arguments.
        folder: Where all its output goes, into ``log.txt``; the terminal gets its progress.
            Defaults to None, to the terminal.
    """
    command = [str(TOOLS / command[0]), *map(str, command[1:])]
    print(f'  $ python {shlex.join([os.path.relpath(command[0]), *command[1:]])}', flush=True)
    command = [sys.executable, '-u', *command]
    if folder is None:
        if subprocess.run(command).returncode:
            sys.exit(f'quickstart: {Path(command[2]).name} failed')
        return
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / 'log.txt'
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with log.open('w') as file, subprocess.Popen(command, **pipes) as process:
        show_progress(process.stdout, file)
    if process.returncode:
        tail = ''.join(log.read_text().splitlines(keepends=True)[-15:])
        sys.exit(f'{tail}\nquickstart: {Path(command[2]).name} failed, all its output is in {log}')


def show_progress(lines: Iterable[str], file: TextIO) -> None:
    """Write the lines of a program to a file, and draw a bar of the iterations in them."""
    with Progress(*Progress.get_default_columns(), transient=True) as progress:
        bar = progress.add_task('      ', total=None)
        for line in lines:
            file.write(line)
            if not (step := describe(line)):
                continue
            text, done, total = step
            progress.update(bar, description=f'      {text}', completed=done, total=total)
            if not progress.console.is_terminal:
                print(f'      {text} {done}/{total}', flush=True)


def describe(line: str) -> tuple[str, int, int] | None:
    """Return what a line of mmengine's log says of the progress: a text, done, of how many."""
    if not (match := PROGRESS.search(line)):
        return None
    loop, done, total = match.groups()
    loss = LOSS.search(line)
    text = f'train, loss {float(loss.group(1)):.2f}' if loop == 'train' and loss else 'evaluate'
    return text, int(done), int(total)


def standard_errors(task: str, work_dir: Path) -> dict[str, float]:
    """Estimate the noise of the differences between the two models' accuracies.

    The validation set is divided into ``PARTS``. How much the difference varies between them tells
    its standard error over the set. Chance in the trainings is not in it.
    """
    of_parts = dict(seg=parts_miou, det=parts_ap)[task]
    sparse, dense = (of_parts(work_dir / f'test-{name}') for name in ('sparse', 'dense'))
    spread = (sparse - dense).std(axis=1, ddof=1) / np.sqrt(PARTS)
    return dict(zip(TASKS[task].metrics, spread.tolist(), strict=True))


def parts_miou(work_dir: Path) -> np.ndarray:
    """Return the mIoU (%) of parts of the validation set, (1, PARTS)."""
    scores = []
    paths = sorted((DATA / 'annotations/val').glob('*.png'))
    for part in range(PARTS):
        counts = np.zeros((len(CLASSES), len(CLASSES)))
        for path in paths[part::PARTS]:
            truth = np.asarray(Image.open(path)).ravel()
            found = np.asarray(Image.open(work_dir / 'predictions' / path.name)).ravel()
            known = truth < len(CLASSES)
            np.add.at(counts, (truth[known], found[known]), 1)
        both = counts.diagonal()
        union = counts.sum(0) + counts.sum(1) - both
        scores.append(100 * (both[union > 0] / union[union > 0]).mean())
    return np.array([scores])


def parts_ap(work_dir: Path) -> np.ndarray:
    """Return the AP (0 to 1) of boxes and masks of parts of the validation set, (2, PARTS)."""
    scores = []
    with redirect_stdout(None):  # pycocotools prints
        truth = COCO(DATA / 'annotations/instances_val.json')
        images = sorted(truth.getImgIds())
        for kind in ('bbox', 'segm'):
            found = truth.loadRes(str(work_dir / f'predictions/coco.{kind}.json'))
            for part in range(PARTS):
                evaluation = COCOeval(truth, found, kind)
                evaluation.params.imgIds = images[part::PARTS]
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
                scores.append(evaluation.stats[0])
    return np.array(scores).reshape(2, PARTS)


def accuracy_rows(metrics: dict, names: dict, errors: dict) -> list[Row]:
    """Accuracies on the validation set, and whether they differ by more than noise."""
    rows = []
    for name, key in names.items():
        dense, sparse, noise = metrics['dense'][key], metrics['sparse'][key], 2 * errors[name]
        verdict = 'equal within' if abs(sparse - dense) <= noise else 'differs by more than'
        rows.append(Row(name, dense, sparse, f'{verdict} the noise, {noise:.3f}'))
    return rows


def keep_rate_rows(metrics: dict, costs: dict) -> list[Row]:
    """Keep rates measured by ``tools/test.py`` over the validation set."""
    targets = costs['rows'][-1]['keep_ratios']
    rates = [rate for name, rate in metrics.items() if name.startswith('eval_keep_rate_')]
    if not rates:  # nothing was trained, and nothing measures them
        return []
    pairs = enumerate(zip(rates, targets, strict=True))
    return [
        Row(f'keep rate {i}', None, rate, f'target {target:.2f}') for i, (rate, target) in pairs
    ]


def cost_rows(costs: dict) -> list[Row]:
    """GMACs and latency of backbone and whole model."""
    rows = []
    for key, unit in (('gmacs', 'GMACs'), ('median', 'latency (ms)')):
        for part in ('backbone', 'whole'):
            dense, sparse = (row[key] for row in costs['rows'] if row['part'] == part)
            word = ', more' if sparse > dense else ''
            if key == 'median':
                word = ', faster' if sparse < dense else ', slower'
            rows.append(Row(f'{unit} {part}', dense, sparse, f'{dense / sparse:.2f} x{word}'))
    return rows


def conditions(length: int, costs: dict, image: Path) -> list[str]:
    """State how the numbers came about; ``length`` is that of the fine-tuning, 0 without."""
    setting = costs['setting']
    training = 'both models have the same weights.'
    if length:
        training = (
            f'both models were fine-tuned for {length} iterations from one dense checkpoint with '
            'the same learning rate and seed, one run each.'
        )
    return [
        f'Latency: {setting["device"]}, {setting["threads"]} threads, float32, batch 1, '
        f'{SIZE} x {SIZE} px ({image.name}), torch {setting["torch"]}; dense and sparse alternate, '
        f'median of {ROUNDS} calls.',
        f'Accuracy: {training} Noise: twice the standard error of the difference, from {PARTS} '
        f'parts of the {NUM_VAL} validation scenes.',
        'What each part of the model took is in benchmark/log.txt.',
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
