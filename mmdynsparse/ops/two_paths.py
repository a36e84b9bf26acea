"""Slow where a location is kept, fast where it is dropped.

Source: asymmetric computation of Rao et al., T-PAMI 2023, section 3.3. Both executions have one
meaning: for the same decision they return the same map. Dimension letters: B images, N locations,
C channels.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .regions import region
from .select import Decision, with_positions

Path = Callable[[Tensor], Tensor]


def two_paths(
    x_BNC: Tensor, slow: Path, fast: Path | None, decision: Decision, gather: bool
) -> Tensor:
    """Compute the slow path at kept locations and the fast path at dropped ones.

    Args:
        x_BNC: Tokens, (B, N, C).
        slow: The expressive path, a function of single tokens: any leading shape, last dim C.
        fast: The light path, likewise, or None for zeros: a residual update leaves dropped
            tokens as they are.
        decision: Which locations are kept; N is the product of its ``hw``.
        gather: Compute each path on its own locations only (inference) rather than both
            everywhere, combined by the mask (training: the mask receives a gradient).

    Returns:
        (B, N, C), in the dtype of the slow path's output.
    """
    return (_gathered if gather else _masked)(x_BNC, slow, fast, decision)


def _masked(x_BNC: Tensor, slow: Path, fast: Path | None, decision: Decision) -> Tensor:
    with region('slow path'):
        slow_BNC = slow(x_BNC)
    mask_BN1 = decision.mask.unsqueeze(-1).to(slow_BNC.dtype)
    if fast is None:
        return slow_BNC * mask_BN1
    with region('fast path'):
        fast_BNC = fast(x_BNC).to(slow_BNC.dtype)
    # lerp returns its ends exactly, so a kept location has the slow path's bits.
    return torch.lerp(fast_BNC, slow_BNC, mask_BN1)


def _gathered(x_BNC: Tensor, slow: Path, fast: Path | None, decision: Decision) -> Tensor:
    if decision.kept is None:
        decision = with_positions(decision)
    x_flat = x_BNC.flatten(0, 1)
    with region('gather'):
        x_KC = x_flat.index_select(0, decision.kept)
    with region('slow path'):
        slow_KC = slow(x_KC)
    with region('scatter'):
        out = slow_KC.new_zeros(x_flat.shape).index_copy_(0, decision.kept, slow_KC)
    if fast is not None:
        with region('gather'):
            x_MC = x_flat.index_select(0, decision.dropped)
        with region('fast path'):
            fast_MC = fast(x_MC)
        with region('scatter'):
            out.index_copy_(0, decision.dropped, fast_MC.to(out.dtype))
    return out.view_as(x_BNC)
