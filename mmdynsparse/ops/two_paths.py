"""From a mask to fewer multiply-adds: slow where a location is kept, fast where it is dropped.

Source: asymmetric computation of Rao et al., T-PAMI 2023, section 3.3. Both executions have one
meaning: for the same decision they return the same map. Dimension letters: B images, N locations,
C channels, K kept and M dropped locations (or cells) of the whole batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .cells import cell_positions
from .kernels import MlpWeights, fused_paths
from .regions import region
from .rows import put_rows
from .select import Decision, kept_and_dropped, location_mask

Path = Callable[[Tensor], Tensor]

# How a model in eval mode may be executed.
EXECUTIONS = ('gather', 'triton', 'masked')
# Without a fast path, the share of kept locations above which masked execution may be faster
# (benchmarks/README.md: at 0.95 by up to 24% in wide maps, at 0.9 by 7% at most).
BREAK_EVEN = 0.9


class Plan(NamedTuple):
    """How the blocks that share a decision are executed.

    Attributes:
        form: 'dense': the slow path everywhere. 'masked': both paths everywhere, combined by the
            mask. 'gather': each path on its own locations. 'triton': the same in fused kernels.
        decision: The decision, or None if there is none.
        mask: (B, N) float, 1 at kept locations and 0 at dropped ones; for 'masked' alone.
        kept: (K,) int64 positions in the flattened (B * N) batch; for 'gather' and 'triton' alone.
            Those of cells come cell by cell, and where shapes are static one may be there twice.
        dropped: (M,) int64, the other positions.
    """

    form: str
    decision: Decision | None = None
    mask: Tensor | None = None
    kept: Tensor | None = None
    dropped: Tensor | None = None

    @property
    def gathers(self) -> bool:
        """Whether each path computes its own locations only."""
        return self.kept is not None


DENSE = Plan('dense')


def form_of(decision: Decision, execution: str, learns: bool) -> str:
    """Return the form of a :class:`Plan`, before it is asked whether gathering pays.

    Args:
        decision: Which cells are kept.
        execution: One of ``EXECUTIONS``: what is used in eval mode.
        learns: Whether something learns by the mask, in training mode. The mask and the fast path
            then take part even at keep ratio 1: no parameter is without a gradient, and a mask of
            ones gives the slow path's value exactly.
    """
    if decision.keeps_all and not learns:
        return 'dense'
    return 'masked' if learns else execution


def plan(
    decision: Decision,
    execution: str,
    learns: bool,
    has_fast_path: bool = True,
    of_cells: bool = False,
    break_even: float = BREAK_EVEN,
) -> Plan:
    """Choose how to execute what a decision is about.

    Args:
        decision: Which cells are kept.
        execution: As of :func:`form_of`.
        learns: As of :func:`form_of`.
        has_fast_path: Without a fast path, which masked execution computes everywhere beside the
            slow one, gathering pays only where enough is dropped. Defaults to True.
        of_cells: Whether ``kept`` and ``dropped`` are positions of cells rather than of locations.
            Defaults to False.
        break_even: Share of kept cells from which on masked execution is as fast without a fast
            path. Defaults to that of the FFNs of transformers.
    """
    form = form_of(decision, execution, learns)
    if form == 'dense':
        return DENSE
    if form != 'masked':
        rows = kept_and_dropped(decision)
        batch, n = decision.mask.shape
        if decision.count is None:
            pays = has_fast_path or rows[0].shape[0] <= break_even * batch * n
        else:  # the same, without the batch, which may be a symbol while a model is exported
            pays = has_fast_path or decision.count <= break_even * n
        if pays or form == 'triton':
            if not of_cells and decision.cell_size > 1:
                hw, size = decision.hw, decision.cell_size
                rows = [cell_positions(cells, batch, hw, size) for cells in rows]
            return Plan(form, decision, None, *rows)
    return Plan('masked', decision, location_mask(decision))


def two_paths(
    x_BNC: Tensor,
    residual_BNC: Tensor,
    slow: Path,
    fast: Path | None,
    plan: Plan,
    drop_path: Path,
    slow_weights: Callable[[], MlpWeights] | None = None,
) -> Tensor:
    """Add the slow path's update at kept locations and the fast path's at dropped ones.

    Args:
        x_BNC: Tokens, (B, N, C).
        residual_BNC: What the update is added to, (B, N, C); often ``x_BNC`` itself.
        slow: The expressive path, a function of single tokens: any leading shape, last dim C. It
            returns a tensor of its own, which gathered execution may change.
        fast: The light path, likewise, or None: dropped tokens get no update.
        plan: Which locations are kept, and how that is executed.
        drop_path: Stochastic depth of the update, image by image.
        slow_weights: Returns the parameters of the slow path for a fused kernel; a fast path has
            a method ``weights`` for its own. Needed by plans of the form 'triton'.

    Returns:
        (B, N, C), in the dtype of the sum of residual and update.
    """
    if not plan.gathers:
        update_BNC = _update_everywhere(x_BNC, slow, fast, plan.mask)
        return residual_BNC + drop_path(update_BNC)
    x, residual = x_BNC.flatten(0, 1), residual_BNC.flatten(0, 1)
    if plan.form == 'triton' and slow_weights is not None:
        out = fused_paths(x, residual, plan.kept, plan.dropped, slow_weights(), fast)
        return out.view_as(residual_BNC)
    # With a fast path every row is written by one of the two.
    out = residual.clone() if fast is None else torch.empty_like(residual)
    training = getattr(drop_path, 'training', False)
    scale_B1 = drop_path(x_BNC.new_ones(len(x_BNC), 1)) if training else None
    paths = (('slow path', slow, plan.kept), ('fast path', fast, plan.dropped))
    for name, path, rows in paths:
        if path is None:
            continue
        with region('gather'):
            x_RC = x.index_select(0, rows)
            residual_RC = x_RC if residual_BNC is x_BNC else residual.index_select(0, rows)
        with region(name):
            update_RC = path(x_RC)
            if training:
                update_RC = update_RC * scale_B1[rows // x_BNC.shape[1]]
        with region('scatter'):
            out = out.to(torch.promote_types(out.dtype, update_RC.dtype))
            put_rows(out, rows, _sum(update_RC, residual_RC).to(out.dtype))
    return out.view_as(residual_BNC)


def _sum(update_RC: Tensor, residual_RC: Tensor) -> Tensor:
    if torch.is_grad_enabled() or update_RC.dtype != residual_RC.dtype:
        return residual_RC + update_RC
    return update_RC.add_(residual_RC)


def _update_everywhere(
    x_BNC: Tensor, slow: Path, fast: Path | None, mask_BN: Tensor | None
) -> Tensor:
    """Compute the slow path everywhere and, with a mask, combine it with the fast one."""
    if mask_BN is None:
        return slow(x_BNC)
    with region('slow path'):
        slow_BNC = slow(x_BNC)
    mask_BN1 = mask_BN.unsqueeze(-1).to(slow_BNC.dtype)
    if fast is None:
        return slow_BNC * mask_BN1
    with region('fast path'):
        fast_BNC = fast(x_BNC).to(slow_BNC.dtype)
    # lerp returns its ends exactly, so a kept location has the slow path's bits.
    return torch.lerp(fast_BNC, slow_BNC, mask_BN1)
