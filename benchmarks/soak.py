"""Whether memory and open files stay constant in long inference and training of a segmentor.

    python benchmarks/soak.py CONFIG --minutes 120 --iters 2000 --out FOLDER

Four threads run one model on images of 36 sizes, then one thread trains it on the same sizes.
Weights are random and images are noise. Memory is measured twice:

- resident: what the process occupies (RSS);
- in use: the same without what the C library's allocator keeps for later (glibc 2.33 or newer).

A leak shows in both. Blocks of many sizes leave gaps in the allocator's heap, so resident memory
grows for some hundred iterations longer, as it does with a dense model.
"""

import argparse
import ctypes
import itertools
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from threading import Event

import psutil
import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from torch import nn

from mmdynsparse.analysis.environment import environment
from mmdynsparse.analysis.images import image_batch
from mmdynsparse.analysis.report import print_setting, print_table, write_json

THREADS = 4
SIDES = (96, 128, 160, 192, 224, 256)  # px
SIZES = list(itertools.product(SIDES, SIDES))
LIMIT = 0.01  # growth of the memory
SAMPLES = 600  # of a phase, about


def main(argv: Sequence[str] | None = None) -> None:
    """Run both phases, write ``soak.json`` and ``soak.png``, and exit with 1 if one grows.

    Args:
        argv: Command line arguments. Defaults to None, those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('config', type=Path, help='config of a sparse segmentor')
    parser.add_argument('--minutes', type=float, default=120, help='of inference')
    parser.add_argument('--iters', type=int, default=2000, help='of training')
    parser.add_argument('--out', type=Path, required=True, help='folder for the results')
    args = parser.parse_args(argv)
    if not args.config.is_file():
        parser.error(f'config must be an existing file, got {args.config}')
    if not args.minutes > 0:
        parser.error(f'--minutes must be above 0, got {args.minutes}')
    if args.iters < 4:
        parser.error(f'--iters must be at least 4, got {args.iters}')
    if not hasattr(ctypes.CDLL(None), 'mallinfo2'):
        parser.error('memory in use is measured with glibc 2.33 or newer, got another C library')
    model, classes = build_segmentor(parser, args.config)
    command = shlex.join(['benchmarks/soak.py', *(sys.argv[1:] if argv is None else argv)])
    setting = dict(command=command, **environment(torch.device('cpu')), inference_threads=THREADS)
    print_setting(setting)
    phases = dict(
        inference=inference(model, args.minutes * 60), training=training(model, classes, args.iters)
    )
    rows = [dict(phase=name, **summary(samples)) for name, samples in phases.items()]
    header = ('phase', 'passes', 'minutes', 'MiB in use', 'MiB resident', 'files', 'flat')
    print_table('soak', header, [cells(row) for row in rows])
    write_json(dict(setting=setting, rows=rows, samples=phases), args.out / 'soak.json')
    plot(phases, args.out / 'soak.png')
    if not all(row['flat'] for row in rows):
        raise SystemExit(1)


def build_segmentor(parser: argparse.ArgumentParser, config: Path) -> tuple[nn.Module, int]:
    """Build a config's model with random weights.

    Returns:
        The model and the number of its classes.
    """
    cfg = Config.fromfile(config)
    if cfg.get('default_scope') != 'mmseg':
        parser.error(f"config must have default_scope 'mmseg', got {cfg.get('default_scope')!r}")
    init_default_scope('mmseg')
    torch.manual_seed(0)
    model = cfg.model
    for part in (model, model.backbone):
        part.pop('init_cfg', None)
        part.pop('pretrained', None)
    for head in ('decode_head', 'auxiliary_head'):
        if head in model:
            model[head].norm_cfg = dict(type='BN')  # SyncBN has no CPU implementation
    # All sides are multiples of it, so that nothing is padded.
    model.data_preprocessor.update(size=None, size_divisor=32)
    return MODELS.build(model), model.decode_head.num_classes


class MallocInfo(ctypes.Structure):
    """What glibc's ``mallinfo2`` returns: ten numbers, of which one is needed here.

    Attributes:
        free: Bytes that were freed and that the allocator keeps.
    """

    _fields_ = (
        ('before', ctypes.c_size_t * 8),
        ('free', ctypes.c_size_t),
        ('behind', ctypes.c_size_t),
    )


def sample(start: float, passes: int) -> dict:
    """Return seconds, passes, memory (MiB) and open files at this moment."""
    process = psutil.Process()
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = MallocInfo
    resident = process.memory_info().rss
    return dict(
        seconds=round(time.monotonic() - start, 2),
        passes=passes,
        in_use=round((resident - mallinfo().free) / 2**20, 2),
        resident=round(resident / 2**20, 2),
        files=process.num_fds(),
    )


def inference(model: nn.Module, seconds: float) -> list[dict]:
    """Run a model in several threads for some seconds; returns the samples."""
    model.eval()
    stop, passes = Event(), [0] * THREADS

    def work(thread: int) -> None:
        while not stop.is_set():
            hw = SIZES[(passes[thread] + thread * len(SIZES) // THREADS) % len(SIZES)]
            model.test_step(image_batch(1, hw, 'mmseg', seed=passes[thread]))
            passes[thread] += 1

    start, samples = time.monotonic(), []
    with ThreadPoolExecutor(THREADS) as pool:
        jobs = [pool.submit(work, thread) for thread in range(THREADS)]
        try:
            while time.monotonic() - start < seconds and not any(job.done() for job in jobs):
                time.sleep(seconds / SAMPLES)
                samples.append(sample(start, sum(passes)))
        finally:
            stop.set()
        for job in jobs:
            job.result()
    return samples


def training(model: nn.Module, classes: int, iters: int) -> list[dict]:
    """Train a model for some iterations of two images; returns the samples."""
    model.train()
    wrapper = OptimWrapper(torch.optim.AdamW(model.parameters(), lr=1e-5))
    start, samples = time.monotonic(), []
    for i in range(iters):
        hw = SIZES[i % len(SIZES)]
        batch = image_batch(2, hw, 'mmseg', seed=i)
        for data in batch['data_samples']:
            data.gt_sem_seg = PixelData(data=torch.randint(0, classes, (1, *hw)))
        model.train_step(batch, wrapper)
        if i % max(1, iters // SAMPLES) == 0:
            samples.append(sample(start, i + 1))
    return samples


def summary(samples: Sequence[Mapping]) -> dict:
    """Compare the last quarter of the samples with an earlier one, by their medians.

    It is the second quarter for files and memory in use, the third for resident memory.
    """
    quarters = [samples[i * len(samples) // 4 : (i + 1) * len(samples) // 4] for i in range(4)]
    in_use, resident, files = (
        [median(x[key] for x in quarters[i]) for i in (earlier, 3)]
        for key, earlier in (('in_use', 1), ('resident', 2), ('files', 1))
    )
    return dict(
        passes=samples[-1]['passes'],
        minutes=round(samples[-1]['seconds'] / 60, 2),
        in_use=in_use,
        resident=resident,
        files=files,
        flat=max(growth(in_use), growth(resident)) <= LIMIT and files[1] <= files[0],
    )


def growth(memory: Sequence[float]) -> float:
    """Return by what share memory has grown, given before and after."""
    return memory[1] / memory[0] - 1


def cells(row: Mapping) -> tuple[str, ...]:
    """Return a row of the table."""
    in_use, resident = (
        '{:.0f} -> {:.0f} ({:+.2%})'.format(*memory, growth(memory))
        for memory in (row['in_use'], row['resident'])
    )
    files = '{:g} -> {:g}'.format(*row['files'])
    flat = 'yes' if row['flat'] else 'no'
    return row['phase'], str(row['passes']), f'{row["minutes"]:.1f}', in_use, resident, files, flat


def plot(phases: Mapping[str, Sequence[Mapping]], path: Path) -> None:
    """Plot memory and open files over time, one panel for each phase."""
    figure = Figure(figsize=(9, 3.6), layout='constrained')
    for ax, (name, samples) in zip(figure.subplots(1, len(phases)), phases.items(), strict=True):
        minutes = [x['seconds'] / 60 for x in samples]
        for key in ('resident', 'in_use'):
            ax.plot(minutes, [x[key] for x in samples], label=key.replace('_', ' '))
        ax.set(title=name, xlabel='minutes', ylabel='MiB', ylim=(0, None))
        files = ax.twinx()
        files.plot(minutes, [x['files'] for x in samples], color='tab:green', label='open files')
        ax.legend(handles=[*ax.lines, *files.lines], loc='lower right')
        files.set(ylabel='open files', ylim=(0, None))
    figure.savefig(path, dpi=120)


if __name__ == '__main__':
    main()
