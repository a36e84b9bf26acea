"""Search for the keep ratios that change a model's outputs least at a given cost.

Decisions that move together are a group, and have one ratio. Costs are shares of the cost of the
dense original, and those of the groups are taken to add up. Dimension letters: D groups, K ratios
of the grid, which rise.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import nn

from ..models.decider import deciders

# Ratios that are measured. Between the last two there is nothing: below 1.0 a predictor runs and
# locations are gathered, so the cost jumps there.
GRID = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
PARENTS = 8  # best vectors of which new ones are made
SPREAD = 0.2  # of the factor by which a new vector differs, as a logarithm
SWITCH = 0.1  # how often a group begins or ceases to keep everything


class Group(NamedTuple):
    """Decisions of a part of the model that have one keep ratio."""

    part: str  # name of the part
    size: int  # number of decisions, those of stages that follow included
    falls: bool = False  # whether the ratio must not be above that of the group before
    follows: bool = False  # whether the backbone's predictors decide for another part


def find_groups(model: nn.Module) -> list[Group]:
    """Return the groups of a model's sparse parts, in the order of ``deciders``."""
    groups = []
    for part, decider in deciders(model).items():
        first = True
        for follows in decider.sparsity.followers:
            if follows:
                groups[-1] = groups[-1]._replace(size=groups[-1].size + 1)
                continue
            groups.append(Group(part, 1, decider.falling and not first, decider.follows))
            first = False
    return groups


def by_part(groups: Sequence[Group], ratios: Sequence[float]) -> dict[str, list[float]]:
    """Return the keep ratios of all decisions of each part for ratios (D,) of the groups."""
    parts = {group.part: [] for group in groups}
    for group, ratio in zip(groups, ratios, strict=True):
        parts[group.part] += [float(ratio)] * group.size
    return parts


def probe(groups: Sequence[Group], index: int, ratio: float) -> np.ndarray:
    """Return ratios (D,) in which one group has another ratio and the others keep everything.

    Groups after it that must fall have that ratio too. A part that follows the backbone would keep
    everything with it, so the backbone's decisions then have the highest ratio below 1.
    """
    ratios = np.ones(len(groups))
    if groups[index].follows:
        ratios[[group.part == 'backbone' for group in groups]] = GRID[-2]
    ratios[index] = ratio
    return repair(groups, ratios)


def repair(groups: Sequence[Group], ratios: Sequence[float]) -> np.ndarray:
    """Return the nearest ratios (D,) that a model accepts and that mean what they say.

    They are on the grid's range, have three decimals, do not rise where they must not, and a part
    that follows the backbone keeps everything unless all decisions of the backbone drop something.
    """
    ratios = np.round(np.clip(ratios, GRID[0], 1), 3)
    ratios[(ratios > GRID[-2]) & (ratios < 1)] = GRID[-2]
    for i, group in enumerate(groups):
        if group.falls:
            ratios[i] = min(ratios[i - 1 : i + 1])
    if any(ratios[[group.part == 'backbone' for group in groups]] == 1):
        ratios[[group.follows for group in groups]] = 1
    return ratios


def monotone(costs_DK: np.ndarray) -> np.ndarray:
    """Return costs that do not fall where the ratio rises, next to the given ones.

    It is the mean of the lowest rising curve above them and the highest one below. Costs at ratio
    1 stay: a model that keeps everything runs no predictor, and may cost less than one at 0.9.
    """
    below = costs_DK[:, :-1]
    upper = np.maximum.accumulate(below, axis=1)
    lower = np.minimum.accumulate(below[:, ::-1], axis=1)[:, ::-1]
    return np.concatenate(((upper + lower) / 2, costs_DK[:, -1:]), axis=1)


def differences(groups: Sequence[Group], values_DK: np.ndarray) -> np.ndarray:
    """Return what each group alone adds to the measured values (D, K) of ``probe``."""
    own = values_DK - values_DK[:, -1:]
    for i, group in enumerate(groups):
        if group.falls:  # was measured with the groups before as well
            own[i - 1] -= own[i]
    return own


@dataclass(frozen=True)
class Table:
    """What each group's ratio costs and how much it changes the outputs.

    Args:
        groups: The groups.
        whole: Cost of the model with everything kept.
        costs: What ``GRID`` adds to it.
        losses: What it adds to the divergence.
    """

    groups: Sequence[Group]
    whole: float
    costs: np.ndarray  # (D, K)
    losses: np.ndarray  # (D, K)

    def cost(self, ratios: Sequence[float]) -> float:
        """Return the cost of ratios (D,), with straight lines between those of the grid."""
        rows = zip(ratios, self.costs, strict=True)
        added = (np.interp(r, GRID[:-1], row[:-1]) if r < 1 else row[-1] for r, row in rows)
        return self.whole + float(sum(added))

    def best(self, price: float) -> np.ndarray:
        """Return the ratios (D,) of the grid with the least sum of loss + price * cost.

        Where ratios must fall they are the best of those that do. Of equal ones the largest wins.
        """
        value_DK = self.losses + price * self.costs
        # From the last group on: the best value of this and the groups that must fall after it.
        choices, tail = [], np.zeros(value_DK.shape[1])
        for i in reversed(range(len(value_DK))):
            total = value_DK[i] + tail
            least = np.minimum.accumulate(total)
            index = np.maximum.accumulate(np.where(total == least, np.arange(len(total)), 0))
            choices.insert(0, index)  # of the best ratio that is not above each
            tail = least if self.groups[i].falls else np.zeros_like(least)
        limit, ratios = -1, []
        for group, index in zip(self.groups, choices, strict=True):
            limit = index[limit if group.falls else -1]
            ratios.append(GRID[limit])
        return repair(self.groups, ratios)

    def cheap(self, target: float) -> np.ndarray:
        """Return the ``best`` ratios (D,) of the lowest price at which they cost ``target``."""
        ratios = repair(self.groups, np.full(len(self.groups), GRID[0]))
        low, high = -12.0, 12.0  # as powers of 10
        for _ in range(60):
            middle = (low + high) / 2
            candidate = self.best(10**middle)
            if self.cost(candidate) <= target:
                ratios, high = candidate, middle
            else:
                low = middle
        return ratios

    def fit(self, ratios: Sequence[float], target: float) -> np.ndarray | None:
        """Multiply the ratios below 1 by one factor so that they cost ``target``.

        Returns:
            Ratios (D,) that cost no more, the most expensive such ones below 1 if all cost less;
            None if the least ones cost more.
        """
        ratios = repair(self.groups, ratios)
        if all(ratios == 1):
            return ratios if self.whole <= target else None
        drops = ratios < 1

        def scaled(log_factor: float) -> np.ndarray:
            new = np.clip(ratios * np.exp(log_factor), GRID[0], GRID[-2])
            return repair(self.groups, np.where(drops, new, 1.0))

        low, high = np.log([GRID[0], 1 / GRID[0]])
        if self.cost(scaled(low)) > target:
            return None
        if self.cost(scaled(high)) <= target:
            return scaled(high)
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.cost(scaled(middle)) <= target else (low, middle)
        return scaled(low)

    def uniform(self, target: float) -> np.ndarray:
        """Return the largest ratio that all groups can have at a cost, as a vector (D,)."""
        least = np.full(len(self.groups), GRID[0])
        if self.whole <= target:
            return np.ones_like(least)
        fitted = self.fit(least, target)
        return least if fitted is None else fitted


def evolve(
    table: Table,
    target: float,
    evaluate: Callable[[np.ndarray], float],
    evaluations: int,
    seed: int = 0,
) -> np.ndarray:
    """Find the ratios (D,) with the least loss among those of one cost.

    Where that is enough to keep everything, everything is kept. Otherwise the search starts from
    equal ratios and from ``Table.cheap``. New vectors take each group's ratio from one of two good
    ones, change it a little, and are brought to the cost by ``Table.fit``.

    Args:
        table: Costs, and the losses from which the search starts.
        target: Cost that the vectors have by the table.
        evaluate: Returns the true loss of a vector (D,).
        evaluations: Number of vectors to evaluate, at least 1.
        seed: Of the random numbers. Defaults to 0.
    """
    uniform = table.uniform(target)
    if all(uniform == 1):
        return uniform
    rng = np.random.default_rng(seed)
    losses: dict[tuple[float, ...], float] = {}

    def add(candidates: Iterable[np.ndarray | None]) -> None:
        for ratios in candidates:
            if ratios is not None and tuple(ratios) not in losses and len(losses) < evaluations:
                losses[tuple(ratios)] = evaluate(ratios)

    cheap = (table.fit(table.cheap(factor * target), target) for factor in (1, 0.95, 1.05))
    add((uniform, *cheap))
    for _ in range(10 * evaluations):  # few groups have few different vectors
        if len(losses) == evaluations:
            break
        parents = sorted(losses, key=losses.get)[:PARENTS]
        pair = np.array(parents)[rng.integers(len(parents), size=2)]
        child = np.where(rng.random(pair.shape[1]) < 0.5, *pair)
        changed = child * np.exp(rng.normal(0, SPREAD, len(child)))
        child = np.where(child < 1, np.minimum(changed, GRID[-2]), child)
        other = np.where(child < 1, 1.0, rng.uniform(GRID[0], GRID[-2], len(child)))
        child = np.where(rng.random(len(child)) < SWITCH, other, child)
        add([table.fit(child, target)])
    return np.array(min(losses, key=losses.get))
