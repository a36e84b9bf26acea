"""Keep ratios for a share of the dense model's multiply-adds."""

from collections.abc import Callable

import numpy as np
from torch import nn

from ..models.decider import deciders

LOWEST = 0.1  # keep ratio of every decision at the lower end
STEPS = 7  # halvings of the range


def fit_budget(
    model: nn.Module, budget: float, cost: Callable[[], float]
) -> dict[str, float | list[float]]:
    """Give a model the highest keep ratios whose cost is within a budget.

    The keep ratios that the model has are scaled together: down to ``LOWEST`` or up to 1.

    Args:
        model: The model, which has the keep ratios afterwards.
        budget: Share of the dense model's cost, in (0, 1].
        cost: Returns the model's share of the dense model's cost.

    Returns:
        The keep ratio of each part, or a list where it makes several decisions.

    Raises:
        ValueError: If the lowest keep ratios cost more. The message says how much.
    """
    parts = deciders(model)
    usual = {name: decider.keep_ratios for name, decider in parts.items()}

    def cost_at(scale: float) -> float:
        for name, decider in parts.items():
            decider.set_keep_ratio([_scaled(ratio, scale) for ratio in usual[name]])
        return cost()

    low, high = 0.0, 2.0
    lowest = cost_at(low)
    if lowest > budget:
        raise ValueError(
            f'--budget must be at least {np.ceil(100 * lowest) / 100:.2f}, the share of the '
            f'multiply-adds that is left with {LOWEST:.0%} kept in the parts that were replaced, '
            f'got {budget:g}'
        )
    if cost_at(high) > budget:
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if cost_at(middle) <= budget else (low, middle)
        cost_at(low)
    ratios = {name: list(decider.keep_ratios) for name, decider in parts.items()}
    return {name: r[0] if len(r) == 1 else r for name, r in ratios.items()}


def _scaled(ratio: float, scale: float) -> float:
    """Between ``LOWEST`` (scale 0), a keep ratio (1) and everything (2)."""
    return round(float(np.interp(scale, (0, 1, 2), (min(LOWEST, ratio), ratio, 1.0))), 2)
