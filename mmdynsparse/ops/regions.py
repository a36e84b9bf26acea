"""Names for the parts of a sparse model in a profile.

A region is a range of ``torch.profiler``. Where nothing is profiled it is one check, and compiled
or exported code never contains it.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.profiler import record_function

PREFIX = 'mmdynsparse::'
REGIONS = (
    'predictor',
    'selection',
    'gather',
    'slow path',
    'fast path',
    'scatter',
    'attention',
)


def region(name: str) -> AbstractContextManager:
    """Return a context manager that names what runs within it.

    Regions may be nested; the time of the inner one is not that of the outer one, see
    :func:`mmdynsparse.analysis.breakdown`.

    Args:
        name: One of ``REGIONS``.
    """
    # The first test is a constant for torch.compile, which then does not look at the others.
    if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():
        return nullcontext()
    assert name in REGIONS, name
    return record_function(PREFIX + name)
