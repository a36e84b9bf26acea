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

    def sizes(apply):
        return [result.numel() for result in apply(lambda n: table(n, CPU), [*range(1, 101)] * 2)]

    assert sizes(map) == [*range(1, 101)] * 2
    gc.collect()
    assert sum(reference() is not None for reference in made) == 16
    assert len(made) == 200  # the first ones were gone when they were asked for again
    table(100, CPU)
    assert len(made) == 200

    with ThreadPoolExecutor(4) as pool:  # how many are made again depends on who is late
        assert sizes(pool.map) == [*range(1, 101)] * 2
    gc.collect()
    assert sum(reference() is not None for reference in made) == 16
