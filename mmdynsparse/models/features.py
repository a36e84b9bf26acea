"""Feature maps that carry the decisions made for them."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..ops import Decision, is_exporting


class Features(tuple):
    """Feature maps of a backbone or neck, with the decisions of the forward that made them.

    OpenMMLab's models hand it on as the tuple that it is. A neck that makes other maps leaves the
    decisions behind. The first map carries them as well: a wrapper that rebuilds the tuple of the
    same maps, as ``type(x)(f(y) for y in x)`` of sharded training does, keeps them.

    Args:
        maps: The feature maps.
        decisions: In the order in which they were made. Those of a neck are about its maps.
            Defaults to None, those that the first map carries.
    """

    decisions: tuple[Decision, ...]

    def __new__(
        cls, maps: Iterable[Tensor], decisions: Sequence[Decision] | None = None
    ) -> 'Features':
        """Make the tuple of ``maps``."""
        self = super().__new__(cls, maps)
        if decisions is None:
            self.decisions = getattr(self[0], 'decisions', ()) if self else ()
            return self
        self.decisions = tuple(decisions)
        # Compiled code makes the tuple once, and nothing rebuilds it within.
        if self and isinstance(self[0], Tensor) and not torch.compiler.is_compiling():
            self[0].decisions = self.decisions
        return self


def with_decisions(maps: Iterable[Tensor], decisions: Sequence[Decision]) -> tuple:
    """Return :class:`Features`, or a plain tuple while an export allows torch's types alone.

    The first map then carries the decisions to what is exported together with it.
    """
    if not is_exporting():
        return Features(maps, decisions)
    maps = tuple(maps)
    if not torch.compiler.is_dynamo_compiling():
        maps[0].decisions = tuple(decisions)
    return maps


def decisions_of(maps: Sequence[Tensor]) -> tuple[Decision, ...]:
    """Return the decisions that feature maps carry, none if something else has made them."""
    if is_exporting():
        return getattr(maps[0], 'decisions', ())
    return getattr(maps, 'decisions', ())
