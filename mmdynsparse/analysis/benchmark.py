"""Dense originals and sparse models timed side by side."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import nn

from ..models.calls import replaced_methods
from ..models.decider import keep_ratios
from .dense import Pair
from .execution import forwards, with_keep_ratio
from .flops import count_macs
from .images import image_batch
from .keep_rates import recorded_keep_rates
from .latency import compare_latency
from .model_parts import part_calls, tensor_modules
from .profiling import breakdown, model_breakdown, peak_memory

DENSE = 'dense'


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        scope: 'mmseg' or 'mmdet'.
        parts: Some of ``MODEL_PARTS``.
        batch_sizes: Images per call.
        sizes: Heights and widths of the images, in px.
        keep_ratios: For each sparse variant a number, a list with one for each predictor, or None
            for the config's own.
        device: Where the models are.
        dtype: Of their weights.
        mode: One of ``MODES``, for both sides. Heads of detectors always run eagerly.
        rounds: Timed calls of each variant.
        warmup: Calls before them.
        image: File of an image, or None for noise.
        seed: Of the noise.
    """

    scope: str
    parts: Sequence[str]
    batch_sizes: Sequence[int]
    sizes: Sequence[tuple[int, int]]
    keep_ratios: Sequence[float | Sequence[float] | None]
    device: torch.device
    dtype: torch.dtype = torch.float32
    mode: str = 'eager'
    rounds: int = 30
    warmup: int = 3
    image: str | None = None
    seed: int = 0


def run_benchmark(pair: Pair, plan: Plan) -> Iterator[list[dict]]:
    """Measure every part for every batch and input size; dense and sparse alternate.

    Args:
        pair: Both models on the device of the plan.
        plan: What to measure.

    Yields:
        For each batch size, input size and part the rows of all variants, the dense one first:
        part, mode, batch, size (HxW, px), model, keep_ratios and kept (target and measured share
        of each predictor, the latter for those that the part runs), gmacs, median, p10, p90 (ms),
        speed_up and ideal (dense median and GMACs divided by those of the row), peak_mib; for the
        backbone and the whole also the breakdown (ms).
        Multiply-adds, memory and breakdown are those of eager execution.

    Raises:
        ValueError: If a keep ratio is not valid.
    """
    models = {DENSE: pair.dense}
    for i, ratio in enumerate(plan.keep_ratios):
        models[f'sparse {i}'] = with_keep_ratio(pair.sparse, ratio)
    for batch, hw in product(plan.batch_sizes, plan.sizes):
        data = image_batch(batch, hw, plan.scope, plan.image, plan.seed)
        calls = {
            name: part_calls(model, plan.parts, data, plan.dtype) for name, model in models.items()
        }
        modules = [module for model in models.values() for module in tensor_modules(model)]
        replacements = forwards(modules, plan.mode)
        for part in plan.parts:
            costs = {name: _costs(models[name], part, calls[name][part], plan) for name in models}
            with replaced_methods(replacements):
                latencies = compare_latency(
                    {name: calls[name][part] for name in models}, plan.rounds, plan.warmup
                )
            dense_ms, dense_gmacs = latencies[DENSE].median, costs[DENSE]['gmacs']
            yield [
                dict(
                    part=part,
                    mode=_mode(models[name], part, plan.mode),
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
    with recorded_keep_rates(model) as kept:
        costs = dict(gmacs=count_macs(call) / 1e9)
    costs['peak_mib'] = peak_memory(call, plan.device)
    if part == 'backbone':
        costs['breakdown'] = breakdown(model.backbone, call, plan.device, min(plan.rounds, 5))
    elif part == 'whole':
        costs['breakdown'] = model_breakdown(model, call, plan.device, min(plan.rounds, 5))
    return dict(keep_ratios=keep_ratios(model), kept=kept, **costs)


def _mode(model: nn.Module, part: str, mode: str) -> str:
    """The mode that a part really runs in."""
    runs_eagerly = part == 'head' and not hasattr(model, 'decode_head')
    return 'eager' if runs_eagerly else mode
