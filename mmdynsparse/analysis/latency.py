"""Wall-clock comparison of functions that run side by side."""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch


class Latency(NamedTuple):
    """Median, 10th and 90th percentile of the time of one call, in ms."""

    median: float
    p10: float
    p90: float


def compare_latency(
    functions: Mapping[str, Callable[[], object]], rounds: int = 30, warmup: int = 3
) -> dict[str, Latency]:
    """Time several functions alternately (A B A B ...), without gradients.

    Alternating gives every function the same share of a slow phase of the machine, so ratios of
    the medians hold even where the times themselves drift.

    Args:
        functions: Functions without arguments, by name.
        rounds: Timed calls of each function, at least 1. Defaults to 30.
        warmup: Calls of each function before the first timed one. Defaults to 3.

    Returns:
        The latency of each function, in the order given.

    Raises:
        ValueError: ``rounds`` is below 1 or ``warmup`` below 0.
    """
    if rounds < 1:
        raise ValueError(f'rounds must be at least 1, got {rounds}')
    if warmup < 0:
        raise ValueError(f'warmup must be at least 0, got {warmup}')
    times = {name: [] for name in functions}
    with torch.no_grad():
        for i in range(warmup + rounds):
            for name, function in functions.items():
                start = _now()
                function()
                elapsed = _now() - start
                if i >= warmup:
                    times[name].append(1e3 * elapsed)
    return {n: Latency(*np.percentile(ms, (50, 10, 90)).tolist()) for n, ms in times.items()}


def _now() -> float:
    """Time in s, after all work that was left on the GPU."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
