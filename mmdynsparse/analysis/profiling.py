"""Where the time of a model goes, and how much memory a call takes."""

import os
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from operator import attrgetter

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from ..models.calls import around_calls
from ..ops.regions import PREFIX, REGIONS, region

REST = 'rest'
POST = 'post-processing'
PARTS = (*REGIONS, REST)
WHOLE = PREFIX + 'whole'
MODEL_PREFIX = 'mmdynsparse.model::'
# Modules that are a part wherever they run, by patterns of their names: dense originals and the
# blocks that no decision concerns have no regions of their own.
MODULES = {
    r'(^|\.)predictors\.\d+$': 'predictor',
    r'\.attn$': 'attention',
    r'\.(ffn|norm2|ln2)$|^stages\.\d+\.\d+\.(norm|act|pointwise_conv\d)$': 'slow path',
    r'^layer\d\.\d+$': 'slow path',
    r'\.fast_path$': 'fast path',
}


def breakdown(
    model: nn.Module, function: Callable[[], object], device: torch.device, runs: int = 5
) -> dict[str, float]:
    """Split the time of a call of a backbone into its parts.

    The parts are the regions of :mod:`mmdynsparse.ops.regions`; what lies in none is ``rest``.
    The time of a region within another one belongs to the inner one alone, so the parts add up to
    the time of the whole. In blocks that no decision concerns, those of dense originals too, the
    slow path is the FFN or MLP; in a ResNet it is the block.

    Args:
        model: The backbone, not compiled.
        function: Calls it, without arguments. It runs without gradients.
        device: Where it computes. On the CPU times are elapsed time, on CUDA the time in kernels.
        runs: Profiled calls, after one for warming up. Defaults to 5.

    Returns:
        Mean time in ms of each name in ``PARTS`` and of 'whole'.
    """
    contexts = {
        name: partial(region, part)
        for name, _ in model.named_modules()
        for pattern, part in MODULES.items()
        if re.search(pattern, name)
    }
    with around_calls(model, contexts):
        totals = _profiled(function, device, runs, PREFIX)
    times = {part: totals[part] for part in PARTS}
    return {**times, 'whole': sum(times.values())}


def model_breakdown(
    model: nn.Module, function: Callable[[], object], device: torch.device, runs: int = 5
) -> dict[str, float]:
    """Split the time of a call of a model of mmseg or mmdet among its backbone, neck and heads.

    A head's time is that of its ``predict``, with the resizing that belongs to it. What the heads
    of a detector do with their outputs (decoding and NMS of boxes, pasting of masks) is
    ``post-processing``. ``rest`` is what the model does itself, above all preprocessing. Arguments
    are those of :func:`breakdown`; the function calls ``test_step``.

    Returns:
        Mean time in ms of each part that ran, in the order of the model, of 'rest' and 'whole'.
    """
    names = [name for name, _ in model.named_children() if name != 'data_preprocessor']
    contexts = {name: partial(record_function, MODEL_PREFIX + name) for name in names}
    heads = {n: c for n, c in contexts.items() if hasattr(getattr(model, n), 'predict')}
    others = {n: c for n, c in contexts.items() if n not in heads}
    # Of segmentors it is the resizing of the logits.
    boxes = {} if hasattr(model, 'decode_head') else _with_boxes(model)
    with (
        around_calls(model, others),
        around_calls(model, heads, 'predict'),
        around_calls(model, boxes, 'predict_by_feat'),
    ):
        totals = _profiled(function, device, runs, MODEL_PREFIX)
    times = {name: totals[name] for name in (*names, POST, REST) if name in totals}
    return {**times, 'whole': sum(times.values())}


def _with_boxes(model: nn.Module) -> dict[str, Callable]:
    """Return contexts of what makes boxes and masks of the outputs of heads."""
    names = [name for name, m in model.named_modules() if hasattr(m, 'predict_by_feat')]
    return dict.fromkeys(names, partial(record_function, MODEL_PREFIX + POST))


def _profiled(
    function: Callable[[], object], device: torch.device, runs: int, prefix: str
) -> dict[str, float]:
    """Mean time in ms of the ranges whose names start so, and of the rest of the call."""
    with torch.no_grad():
        function()
        with _profile(device) as profiler:
            for _ in range(runs):
                with record_function(WHOLE):
                    function()
                if device.type == 'cuda':
                    torch.cuda.synchronize()
    own_time = _kernel_time if device.type == 'cuda' else attrgetter('self_cpu_time_total')
    totals = defaultdict(float)
    for event in profiler.events():
        if event.name == WHOLE and event.device_type == DeviceType.CPU:
            _add_times(event, REST, totals, prefix, own_time)
    return defaultdict(float, {part: total / runs / 1e3 for part, total in totals.items()})


def _add_times(
    event: object, part: str, totals: dict[str, float], prefix: str, own_time: Callable
) -> None:
    """Add the own time (us) of an event, and of all within it, to the innermost range around."""
    totals[part] += own_time(event)
    for child in event.cpu_children:
        inner = child.name.removeprefix(prefix) if child.name.startswith(prefix) else part
        _add_times(child, inner, totals, prefix, own_time)


def _kernel_time(event: object) -> float:
    """Time (us) of the kernels that an event has launched itself."""
    # The event itself may be among them, under its own name.
    return sum(kernel.duration for kernel in event.kernels if kernel.name != event.name)


def peak_memory(function: Callable[[], object], device: torch.device) -> float:
    """Measure by how much a call raises the memory that torch has allocated, at its peak.

    What exists before the call (weights, inputs) does not count; what it returns does. On CUDA
    the caching allocator's own statistics are read. On the CPU the allocations and frees that
    torch's profiler records are summed up in their order: unlike the size of the process, they do
    not depend on what the allocator keeps. Scratch memory within a library such as oneDNN is not
    seen.

    Args:
        function: Function without arguments. It runs without gradients.
        device: Where it computes.

    Returns:
        MiB (2 ** 20 bytes).
    """
    with torch.no_grad():
        peak = _cuda_peak(function) if device.type == 'cuda' else _cpu_peak(function, device)
    return peak / 2**20


def _cuda_peak(function: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _cpu_peak(function: Callable[[], object], device: torch.device) -> int:
    with _profile(device, profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e for e in events if e.name() == '[memory]'), key=lambda e: e.start_ns())
    return max(accumulate((e.nbytes() for e in changes), initial=0))


@contextmanager
def _profile(device: torch.device, **kwargs) -> Iterator[profile]:
    activities = [ProfilerActivity.CPU]
    if device.type == 'cuda':
        activities.append(ProfilerActivity.CUDA)
    # Without a GPU the profiler of a CUDA build of torch logs an error that is none.
    os.environ.setdefault('KINETO_LOG_LEVEL', '5')
    with warnings.catch_warnings():
        # It says that events of one cycle are kept, and there is only one.
        warnings.filterwarnings('ignore', message='.*Profiler clears events')
        with profile(activities=activities, **kwargs) as profiler:
            yield profiler
