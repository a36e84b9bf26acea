"""Feature maps that carry the decisions made for them."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..ops import Decision


class Features(tuple):
    """Feature maps of a backbone or neck, with the decisions of the forward that made them.

    OpenMMLab's models hand it on as the tuple that it is. A neck that makes another tuple of it
    leaves the decisions behind.

    Args:
        maps: The feature maps.
        decisions: In the order in which they were made. Defaults to none.
        cell_size: Side of a location of the last decision in the first map, in positions, if it
            is a neck's, which is about these maps. Defaults to None, a backbone's.
    """

    decisions: tuple[Decision, ...]
    cell_size: int | None

    def __new__(
        cls,
        maps: Iterable[Tensor],
        decisions: Sequence[Decision] = (),
        cell_size: int | None = None,
    ) -> 'Features':
        """Make the tuple of ``maps``."""
        self = super().__new__(cls, maps)
        self.decisions = tuple(decisions)
        self.cell_size = cell_size
        return self


def with_decisions(
    maps: Iterable[Tensor], decisions: Sequence[Decision], cell_size: int | None = None
) -> tuple:
    """Return :class:`Features`, or a plain tuple of the maps while they are exported."""
    return tuple(maps) if is_exporting() else Features(maps, decisions, cell_size)


def is_exporting() -> bool:
    """Whether torch.export traces the model, whose outputs must then be types of torch's."""
    # torch.compiler.is_exporting is a constant for Dynamo, true under torch.compile as well.
    if getattr(torch.compiler, '_is_exporting_flag', False):
        return True
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
