"""Measured keep rates of a model that is not in training."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..engine.hooks.sparsity_hook import KeepRateMeter
from ..models.decider import deciders


@contextmanager
def recorded_keep_rates(model: nn.Module) -> Iterator[list[float]]:
    """Record what share of the locations the predictors keep.

    Args:
        model: The model.

    Yields:
        A list that gets, at the end, the share that each predictor kept, in the order of the
        modules: the mean over the images of all calls, of which a sliding window makes several an
        image. Those of a part that did not run are left out.
    """
    meter, rates = KeepRateMeter(list(deciders(model).values())), []
    try:
        yield rates
    finally:
        meter.close()
    rates += [rate for rate in meter.pop() if rate == rate]  # NaN without a call
