"""Budgets: keep ratios for all sparse parts of a model, by a name such as '0.6'."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from .decider import deciders, set_keep_ratio


def set_budget(model: nn.Module, budget: str | float) -> None:
    """Give all sparse parts of a model the keep ratios of a budget.

    Args:
        model: The model.
        budget: Name of one of the model's budgets, which its checkpoint brought, or as a number
            what is 1.0 (everything is kept) or the name of one. ``'FILE.json:NAME'`` is a budget
            of a file of ``search_budgets.py``, which the model takes over with all others in it.

    Raises:
        ValueError: If the file cannot be used or is of another architecture, the model has no
            budgets, or none of this name.
    """
    if not isinstance(budget, str):
        budget = f'{budget:g}'  # as search_budgets.py names them
    if '.json:' in budget:
        path, _, budget = budget.rpartition(':')
        add_budgets(model, read_budgets(path))
    parts = deciders(model)
    if not parts:
        raise ValueError(f'budget needs a model with a sparse part, got a {type(model).__name__}')
    names = list(budgets(model))
    if budget in ('1', '1.0') and budget not in names:
        ratios = {part: 1.0 for part in parts}
    elif budget in names:
        ratios = {part: decider.budgets[budget] for part, decider in parts.items()}
    else:
        known = ', '.join(names) or 'none: name a file of search_budgets.py, FILE.json:NAME'
        raise ValueError(f'budget must be 1.0 or one that the model has ({known}), got {budget}')
    set_keep_ratio(model, ratios)


def budgets(model: nn.Module) -> dict[str, dict[str, list[float]]]:
    """Return the keep ratios by part, of each budget that all sparse parts of a model have."""
    parts = deciders(model)
    names = [set(decider.budgets) for decider in parts.values()]
    first = next(iter(parts.values())).budgets if parts else ()
    common = [name for name in first if name in set.intersection(*names)]
    return {name: {p: decider.budgets[name] for p, decider in parts.items()} for name in common}


def read_budgets(path: str | os.PathLike) -> dict[str, dict[str, list[float]]]:
    """Return the keep ratios by part, of each budget in a file of ``search_budgets.py``.

    Raises:
        ValueError: If the file does not exist or holds something else.
    """
    if not os.path.isfile(path):
        raise ValueError(f'budget must name an existing file before the colon, got {str(path)!r}')
    try:
        with open(path, encoding='utf-8') as file:
            table = json.load(file)
        return {name: dict(row['keep_ratios']) for name, row in table['budgets'].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f'budget must name a file of search_budgets.py, got {str(path)!r}, which lacks '
            f'budgets with keep_ratios ({type(error).__name__}: {error})'
        ) from None


def add_budgets(model: nn.Module, table: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Let a model have budgets, which its checkpoints carry from then on.

    Args:
        model: The model, which is not changed if one of the budgets does not fit.
        table: Keep ratios by part, of each budget.

    Raises:
        ValueError: If a budget is not of the model's sparse parts.
    """
    parts = deciders(model)
    for name, ratios in table.items():
        if set(ratios) != set(parts):
            raise ValueError(
                f"budget {name} must be of the model's sparse parts {sorted(parts)}, got "
                f'{sorted(ratios)}'
            )
        for part, decider in parts.items():
            try:
                decider.check(ratios[part])
            except ValueError as error:
                raise ValueError(f'budget {name} does not fit {part}: {error}') from None
    for part, decider in parts.items():
        decider.budgets = {
            **decider.budgets,
            **{name: list(ratios[part]) for name, ratios in table.items()},
        }


@contextmanager
def same_keep_ratios(model: nn.Module) -> Iterator[None]:
    """Give a model the keep ratios that it has now again at the end."""
    before = {decider: decider.keep_ratios for decider in deciders(model).values()}
    try:
        yield
    finally:
        for decider, ratios in before.items():
            decider.keep_ratios = ratios
