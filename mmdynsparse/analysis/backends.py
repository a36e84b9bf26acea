"""Dense originals and sparse models in torch and in the export runtimes, side by side."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import numpy as np
import torch
from torch import nn

from ..deployment.export import describe, export_model
from ..deployment.graph import build_graph
from ..deployment.runtime import BACKENDS as RUNTIMES
from ..deployment.runtime import PACKAGE, Session
from ..models.decider import keep_ratios
from .benchmark import DENSE, Plan
from .dense import Pair
from .execution import with_keep_ratio
from .latency import compare_latency
from .report import print_table

INT8 = 'onnxruntime-int8'
BACKENDS = ('torch', *RUNTIMES, INT8)


def run_backends(pair: Pair, plan: Plan, backends: Sequence[str]) -> Iterator[list[dict]]:
    """Time what is exported of the models, in every backend, for every batch and input size.

    The whole is a segmentor from raw images to logits, a detector to the predictions of its dense
    head. All calls alternate, on as many threads as torch has.

    Args:
        pair: The models, on the CPU in float32.
        plan: Parts ('backbone' and 'whole'), batch and input sizes, keep ratios, rounds. Images are
            noise.
        backends: Some of ``BACKENDS``.

    Yields:
        For each part, batch and input size the rows of all variants: part, backend, model,
        keep_ratios, batch, size, median, p10, p90 (ms), speed_up over the dense model in the same
        backend, difference: largest one of an output from torch's.

    Raises:
        ValueError: If a model cannot be exported, or a runtime is not installed.
    """
    models = {DENSE: pair.dense}
    for i, ratio in enumerate(plan.keep_ratios):
        models[f'sparse {i}'] = with_keep_ratio(pair.sparse, ratio)
    for batch, hw, part in product(plan.batch_sizes, plan.sizes, plan.parts):
        images = np.random.default_rng(plan.seed).integers(0, 256, (batch, 3, *hw), np.uint8)
        calls = {}
        with TemporaryDirectory() as folder:
            for name, model in models.items():
                for backend, call in _calls(model, part, images, Path(folder), backends):
                    calls[backend, name] = call
        expected = {name: calls['torch', name]() for name in models}
        differences = {key: _difference(call(), expected[key[1]]) for key, call in calls.items()}
        calls = {key: call for key, call in calls.items() if key[0] in backends}
        latencies = compare_latency(calls, plan.rounds, plan.warmup)
        yield [
            dict(
                part=part,
                backend=backend,
                model=name.split()[0],
                keep_ratios=keep_ratios(models[name]),
                batch=batch,
                size=f'{hw[0]}x{hw[1]}',
                **latency._asdict(),
                speed_up=latencies[backend, DENSE].median / latency.median,
                difference=differences[backend, name],
            )
            for (backend, name), latency in latencies.items()
        ]


def backend_table(rows: Sequence[dict]) -> None:
    """Print the rows, with the first row's time, dense torch's as a rule, for comparison."""
    header = ('part', 'backend', 'model', 'batch', 'size', 'median ms', 'p10', 'p90')
    header += ('over its dense', f'over {rows[0]["backend"]} dense', 'difference')
    cells, first = [], {}
    for row in rows:
        setting = (row['part'], row['batch'], row['size'])
        ratios = ' '.join(f'{ratio:g}' for ratio in row['keep_ratios'])
        times = (f'{row[key]:.1f}' for key in ('median', 'p10', 'p90'))
        over = first.setdefault(setting, row['median']) / row['median']
        speed = (f'{row["speed_up"]:.2f} x', f'{over:.2f} x', f'{row["difference"]:.0e}')
        part, *sizes = map(str, setting)
        names = (part, row['backend'], f'{row["model"]} {ratios}', *sizes)
        cells.append((*names, *times, *speed))
    print_table('from images to logits, or to the dense head of a detector', header, cells)


def _calls(
    model: nn.Module, part: str, images: np.ndarray, folder: Path, backends: Sequence[str]
) -> Iterator[tuple[str, Callable]]:
    """Yield torch's call of a model, and that of each runtime."""
    graph = build_graph(model, images.shape[2:], part=part)
    yield 'torch', partial(_in_torch, graph, torch.from_numpy(images))
    folder = Path(mkdtemp(dir=folder))
    for backend in [name for name in backends if name != 'torch']:
        runtime, _, bits = backend.partition('-')
        suffix = PACKAGE if runtime == 'aotinductor' else '.onnx'
        path = folder / f'{bits or "float"}{suffix}'
        if not path.exists():
            calibration = images.transpose(0, 2, 3, 1) if bits else ()
            export_model(
                graph, path, describe(graph, None), len(images), calibration=list(calibration)
            )
        session = Session(path, runtime, torch.get_num_threads())
        yield backend, partial(session, images)


def _difference(outputs: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    pairs = zip(outputs, expected, strict=True)
    return max(float(np.abs(a - b).max()) for a, b in pairs)


def _in_torch(graph: nn.Module, images: torch.Tensor) -> list[np.ndarray]:
    with torch.inference_mode():
        return [x.numpy() for x in graph(images)]
