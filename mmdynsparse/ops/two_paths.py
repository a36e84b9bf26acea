"""Slow where a location is kept, fast where it is dropped.

Source: asymmetric computation of Rao et al., T-PAMI 2023, section 3.3. Both executions have one
meaning: for the same decision they return the same map. Dimension letters: B images, N locations,
C channels.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .regions import region
from .rows import put_rows
from .select import Decision, with_positions

Path = Callable[[Tensor], Tensor]

# Without a fast path, the share of kept locations above which masked execution may be faster
# (benchmarks/README.md: at 0.95 by up to 24% in wide maps, at 0.9 by 7% at most).
BREAK_EVEN = 0.9


def gathering_pays(decision: Decision, fast: object | None, break_even: float = BREAK_EVEN) -> bool:
    """Whether gathered execution is expected to be faster than masked execution.

    It is where there is a fast path, which masked execution computes everywhere beside the slow
    one, or where enough locations are dropped.

    Args:
        decision: Which locations are kept.
        fast: The fast path or None.
        break_even: Share of kept locations from which on masked execution is as fast. Defaults to
            that of the FFNs of transformers.
    """
    if fast is not None or decision.kept is None:
        return True
    return len(decision.kept) <= break_even * decision.mask.numel()


def two_paths(
    x_BNC: Tensor,
    residual_BNC: Tensor,
    slow: Path,
    fast: Path | None,
    decision: Decision,
    gather: bool,
    drop_path: Path,
) -> Tensor:
    """Add the slow path's update at kept locations and the fast path's at dropped ones.

    Args:
        x_BNC: Tokens, (B, N, C).
        residual_BNC: What the update is added to, (B, N, C); often ``x_BNC`` itself.
        slow: The expressive path, a function of single tokens: any leading shape, last dim C. It
            returns a tensor of its own, which gathered execution may change.
        fast: The light path, likewise, or None: dropped tokens get no update.
        decision: Which locations are kept; N is the product of its ``hw``.
        gather: Compute each path on its own locations only (inference) rather than both
            everywhere, combined by the mask (training: the mask receives a gradient).
        drop_path: Stochastic depth of the update; it plays no part in gathered execution.

    Returns:
        (B, N, C), in the dtype of the sum of residual and update.
    """
    if not gather:
        return residual_BNC + drop_path(_masked_update(x_BNC, slow, fast, decision))
    if decision.kept is None:
        decision = with_positions(decision)
    x, residual = x_BNC.flatten(0, 1), residual_BNC.flatten(0, 1)
    # With a fast path every row is written by one of the two.
    out = residual.clone() if fast is None else torch.empty_like(residual)
    paths = (('slow path', slow, decision.kept), ('fast path', fast, decision.dropped))
    for name, path, rows in paths:
        if path is None:
            continue
        with region('gather'):
            x_RC = x.index_select(0, rows)
            residual_RC = x_RC if residual_BNC is x_BNC else residual.index_select(0, rows)
        with region(name):
            update_RC = path(x_RC)
        with region('scatter'):
            out = out.to(torch.promote_types(out.dtype, update_RC.dtype))
            put_rows(out, rows, _sum(update_RC, residual_RC).to(out.dtype))
    return out.view_as(residual_BNC)


def _sum(update_RC: Tensor, residual_RC: Tensor) -> Tensor:
    if torch.is_grad_enabled() or update_RC.dtype != residual_RC.dtype:
        return residual_RC + update_RC
    return update_RC.add_(residual_RC)


def _masked_update(x_BNC: Tensor, slow: Path, fast: Path | None, decision: Decision) -> Tensor:
    with region('slow path'):
        slow_BNC = slow(x_BNC)
    mask_BN1 = decision.mask.unsqueeze(-1).to(slow_BNC.dtype)
    if fast is None:
        return slow_BNC * mask_BN1
    with region('fast path'):
        fast_BNC = fast(x_BNC).to(slow_BNC.dtype)
    # lerp returns its ends exactly, so a kept location has the slow path's bits.
    return torch.lerp(fast_BNC, slow_BNC, mask_BN1)
