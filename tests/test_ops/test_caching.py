"""Tables that are kept for each shape do not add up."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import torch

from mmdynsparse.ops.caching import cached

CPU = torch.device('cpu')


def test_at_most_sixteen_results_are_kept():
    made = []

    @cached
    def table(size, device):
        result = torch.arange(size, device=device)
        made.append(weakref.ref(result))
        return result

    with ThreadPoolExecutor(4) as pool:
        sizes = list(pool.map(lambda size: table(size, CPU).numel(), list(range(1, 101)) * 2))
    assert sizes == list(range(1, 101)) * 2
    gc.collect()
    assert sum(reference() is not None for reference in made) == 16
    # Nearly all were gone when they were asked for again; a thread that is late finds its own.
    count = len(made)
    assert 150 < count <= 200
    table(100, CPU)
    assert len(made) == count
