"""Dense originals and sparse models timed side by side."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import nn

from ..engine.hooks.sparsity_hook import recorded_keep_rates
from ..models.calls import replaced_methods
from ..models.decider import keep_ratios
from .dense import Pair
from .detections import fixed_detections, mean_detections
from .execution import forwards, with_keep_ratio
from .flops import count_macs
from .images import image_batch
from .latency import compare_latency
from .model_parts import part_calls, tensor_modules
from .profiling import breakdown, model_breakdown, peak_memory

DENSE = 'dense'


@dataclass(frozen=True)
class Plan:
    """What is measured.

    A keep ratio is that of one sparse variant: a number, a list with one for each predictor, or
    None for the config's own. The mode is that of both sides; heads of detectors run eagerly.
    """

    scope: str  # 'mmseg' or 'mmdet'
    parts: Sequence[str]  # some of MODEL_PARTS
    batch_sizes: Sequence[int]  # images per call
    sizes: Sequence[tuple[int, int]]  # heights and widths of the images, in px
    keep_ratios: Sequence[float | Sequence[float] | None]
    device: torch.device  # where the models are
    dtype: torch.dtype = torch.float32  # of their weights
    mode: str = 'eager'  # one of MODES
    rounds: int = 30  # timed calls of each variant
    warmup: int = 3  # calls before them
    image: str | None = None  # file of an image, noise without one
    seed: int = 0  # of the noise, and of fixed detections
    detections: int | None = None  # of an image; None leaves it to the model


def run_benchmark(pair: Pair, plan: Plan) -> Iterator[list[dict]]:
    """Measure every part for every batch and input size; dense and sparse alternate.

    Yields:
        For each batch size, input size and part the rows of all variants, the dense one first:
        part, mode, batch, size (HxW, px), model, keep_ratios and kept (target and measured share
        of each predictor, the latter for those that the part runs), gmacs, median, p10, p90 (ms),
        speed_up and ideal (dense median and GMACs divided by those of the row), peak_mib; for the
        backbone and the whole also the breakdown (ms), and where a detector makes detections
        their number in an image, the mean.
        Multiply-adds, memory and breakdown are those of eager execution.

    Raises:
        ValueError: If a keep ratio is not valid, or detections are fixed of a model that has no
            RoI head.
    """
    models = {DENSE: pair.dense}
    for i, ratio in enumerate(plan.keep_ratios):
        models[f'sparse {i}'] = with_keep_ratio(pair.sparse, ratio)
    with fixed_detections(list(models.values()), plan.detections, plan.seed):
        yield from _settings(pair, models, plan)


def _settings(pair: Pair, models: dict[str, nn.Module], plan: Plan) -> Iterator[list[dict]]:
    for batch, hw in product(plan.batch_sizes, plan.sizes):
        data = image_batch(batch, hw, plan.scope, plan.image, plan.seed)
        calls = {n: part_calls(m, plan.parts, data, plan.dtype) for n, m in models.items()}
        modules = [module for model in models.values() for module in tensor_modules(model)]
        replacements = forwards(modules, plan.mode)
        for part in plan.parts:
            # Heads of detectors are not among the modules that are compiled or captured.
            is_eager = part == 'head' and not hasattr(pair.dense, 'decode_head')
            mode = 'eager' if is_eager else plan.mode
            costs = {name: _costs(models[name], part, calls[name][part], plan) for name in models}
            with replaced_methods(replacements):
                latencies = compare_latency(
                    {name: calls[name][part] for name in models}, plan.rounds, plan.warmup
                )
            dense_ms, dense_gmacs = latencies[DENSE].median, costs[DENSE]['gmacs']
            yield [
                dict(
                    part=part,
                    mode=mode,
                    batch=batch,
                    size=f'{hw[0]}x{hw[1]}',
                    model=name.split()[0],
                    **latency._asdict(),
                    speed_up=dense_ms / latency.median,
                    ideal=dense_gmacs / costs[name]['gmacs'] if dense_gmacs else 1.0,
                    **costs[name],
                )
                for name, latency in latencies.items()
            ]


def _costs(model: nn.Module, part: str, call: Callable[[], object], plan: Plan) -> dict:
    """What does not depend on the mode and is measured once."""
    outputs = []
    with recorded_keep_rates(model) as kept:
        costs = dict(gmacs=count_macs(lambda: outputs.append(call())) / 1e9)
    if (detections := mean_detections(outputs[0])) is not None:
        costs['detections'] = detections
    costs['peak_mib'] = peak_memory(call, plan.device)
    if part == 'backbone':
        costs['breakdown'] = breakdown(model.backbone, call, plan.device, min(plan.rounds, 5))
    elif part == 'whole':
        costs['breakdown'] = model_breakdown(model, call, plan.device, min(plan.rounds, 5))
    return dict(keep_ratios=keep_ratios(model), kept=kept, **costs)
