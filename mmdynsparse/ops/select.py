"""From importance scores to a decision: which locations take the slow path.

Training samples with the straight-through Gumbel-softmax (Rao et al., T-PAMI 2023, section 3.2;
DynamicViT, eq. 5-7); inference selects without noise. Dimension letters: B images, N locations
(H * W, row by row), K kept and M dropped locations of the whole batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cells import cell_mask, cell_means, cell_positions
from .regions import region


class Decision(NamedTuple):
    """Which locations of a batch of feature maps take the slow path.

    Attributes:
        mask: (B, N) float32, 1 where a location is kept and 0 elsewhere; in training it carries
            the straight-through gradient of the predictor.
        scores: (B, N) float32, log P(keep).
        hw: Height and width of the map, H * W = N.
        ratio: Target keep ratio in (0, 1].
        kept: (K,) int64, sorted positions of the kept locations in the flattened (B * N) batch,
            or None when the decision was made for masked execution. ``spread_decision`` has
            another order, and where shapes are static some positions several times.
        dropped: (M,) int64, the other positions, K + M = B * N, or None like ``kept``.
        cell_size: Side of a location in those of the stage's map, where what is decided for are
            its cells.
    """

    mask: Tensor
    scores: Tensor
    hw: tuple[int, int]
    ratio: float
    kept: Tensor | None = None
    dropped: Tensor | None = None
    cell_size: int = 1

    @property
    def keeps_all(self) -> bool:
        """Whether the target is to keep every location, that is, the dense computation."""
        return self.ratio >= 1


def keep_all(x_BNC: Tensor, hw: tuple[int, int]) -> Decision:
    """Return the decision that keeps every location of ``x_BNC``, made without a predictor."""
    ones_BN = torch.ones(x_BNC.shape[:2], device=x_BNC.device)
    return Decision(ones_BN, torch.zeros_like(ones_BN), hw, 1.0)


def sample_decision(
    log_probs_BN2: Tensor,
    hw: tuple[int, int],
    ratio: float,
    temperature: float = 1.0,
    selector: str = 'topk',
    exact: bool = False,
    extra: float = 0.0,
) -> Decision:
    """Sample a decision for training, with a gradient for the predictor.

    The mask is hard in the forward pass and the Gumbel-softmax probability in the backward pass.
    With ``ratio`` 1 every location is kept without noise; the gradient that says how much keeping
    a location helps still reaches the predictor.

    Args:
        log_probs_BN2: (B, N, 2) log-probabilities [keep, drop].
        hw: Height and width of the map.
        ratio: Target keep ratio in (0, 1].
        temperature: Of the Gumbel-softmax, > 0; it changes the gradient, not how often a location
            is kept. Defaults to 1.
        selector: How locations will be selected at inference. 'random' selects them so here too,
            and its gradient is zero; no other makes a difference. Defaults to 'topk'.
        exact: Whether exactly the ``int(N * ratio)`` locations of each image are kept that the
            noise makes most probable, whatever the probabilities add up to: for scores that were
            learned at another keep ratio. The decision's ratio is then that share, so that a
            ratio loss has no say. Defaults to False.
        extra: Share of the locations that is kept whatever the predictor says, in [0, 1], at
            random; nothing is learned from them. The decision's ratio becomes
            1 - (1 - ratio) * (1 - extra), so a ratio loss pulls the predictor towards ``ratio``
            all the same. Defaults to 0.
    """
    log_probs_BN2 = log_probs_BN2.float()
    if ratio >= 1:
        soft_BN = log_probs_BN2[..., 0].exp()
        hard_BN = torch.ones_like(soft_BN)
    elif selector == 'random':
        # Zero, but a part of the graph: distributed training wants a gradient for each parameter.
        soft_BN = 0 * log_probs_BN2[..., 0].exp()
        hard_BN = random_mask(log_probs_BN2[..., 0].detach(), ratio)
    else:
        soft_BN = F.gumbel_softmax(log_probs_BN2, tau=temperature, dim=-1)[..., 0]
        hard_BN = (soft_BN > 0.5).float()
        if exact:
            hard_BN = topk_mask(soft_BN.detach(), ratio)
            ratio = num_kept(soft_BN.shape[1], ratio) / soft_BN.shape[1]
    if extra > 0 and ratio < 1:
        extra_BN = torch.rand_like(soft_BN) < extra
        soft_BN, hard_BN = soft_BN.masked_fill(extra_BN, 0.0), hard_BN.masked_fill(extra_BN, 1.0)
        ratio = 1 - (1 - ratio) * (1 - extra)
    # The bracket is exactly zero, so the mask is exactly 0 or 1.
    mask_BN = hard_BN + (soft_BN - soft_BN.detach())
    return Decision(mask_BN, log_probs_BN2[..., 0], hw, ratio)


def select_decision(
    log_probs_BN2: Tensor,
    hw: tuple[int, int],
    ratio: float,
    selector: str = 'topk',
    gather: bool = True,
) -> Decision:
    """Select the kept locations of each image at inference.

    Args:
        log_probs_BN2: (B, N, 2) log-probabilities [keep, drop].
        hw: Height and width of the map.
        ratio: Target keep ratio in (0, 1].
        selector: A name in ``SELECTORS``. Defaults to 'topk'.
        gather: Whether to add the positions that gathered execution needs. Defaults to True.

    Raises:
        ValueError: If a score is NaN. On CUDA the device assertion that stops the process instead
            costs no host synchronisation. Compiled and exported code does not look.
    """
    with region('selection'):
        scores_BN = log_probs_BN2[..., 0].float()
        _refuse_nan(scores_BN)
        mask_BN = SELECTORS[selector](scores_BN, ratio)
        decision = Decision(mask_BN, scores_BN, hw, ratio)
        if not gather:
            return decision
        return with_positions(
            decision, num_kept(mask_BN.shape[1], ratio) if selector in FIXED_BUDGET else None
        )


def with_positions(decision: Decision, kept_per_image: int | None = None) -> Decision:
    """Add the sorted flat positions of kept and dropped locations to a decision.

    Args:
        decision: A decision with a mask (B, N) of zeros and ones.
        kept_per_image: The number of kept locations if it is the same for every image; the shapes
            are then static and nothing waits for the device. Defaults to None, which counts.
    """
    mask_BN = decision.mask.detach()
    if kept_per_image is None:
        keep = mask_BN.flatten() > 0.5
        kept, dropped = _nonzero(keep), _nonzero(~keep)
    else:
        kept, dropped = _positions(mask_BN, kept_per_image)
    # torch.compile does not keep what _replace returns as an attribute of the model.
    return Decision(*decision[:4], kept, dropped, decision.cell_size)


def spread_decision(decision: Decision, hw: tuple[int, int], cell_size: int) -> Decision:
    """Turn a decision over the cells of a map into one over its locations.

    Its positions are those of ``cell_positions``: not sorted, but cell by cell.

    Args:
        decision: Over cells.
        hw: Height and width of the map.
        cell_size: Side of a cell, in locations.
    """
    if cell_size == 1:
        return decision
    mask, scores = (cell_mask(values_BN, hw, cell_size).flatten(1) for values_BN in decision[:2])
    positions = (None, None)
    if decision.kept is not None:
        batch = len(mask)
        positions = (
            cell_positions(cells_K, batch, hw, cell_size)
            for cells_K in (decision.kept, decision.dropped)
        )
    return Decision(mask, scores, hw, decision.ratio, *positions)


def resize_scores(
    scores_BN: Tensor, hw: tuple[int, int], new_hw: tuple[int, int], cell_size: int = 1
) -> Tensor:
    """Carry the scores of a decision over to a map of another size.

    What is averaged or interpolated are logits, log P(keep) - log P(drop).

    Args:
        scores_BN: log P(keep), (B, N); what is below -20 or above -1e-6 counts as that.
        hw: Height and width of their map.
        new_hw: Height and width of the other map, which shows the same area.
        cell_size: Side g of the cells of the other map that get a score. Defaults to 1, its
            locations.

    Returns:
        (B, N', 2) log-probabilities [keep, drop], one pair for each location or cell.
    """
    scores_BN = scores_BN.float().clamp(-20.0, -1e-6)
    logits = scores_BN - (-scores_BN.expm1()).log()
    logits = logits.unflatten(1, hw).unsqueeze(1)
    if new_hw[0] > hw[0] or new_hw[1] > hw[1]:
        logits = F.interpolate(logits, new_hw, mode='bilinear')
    elif new_hw != hw:
        logits = F.adaptive_avg_pool2d(logits, new_hw)
    logits_BN1 = cell_means(logits, cell_size)
    return F.logsigmoid(torch.cat((logits_BN1, -logits_BN1), -1))


def num_kept(num_locations: int, ratio: float) -> int:
    """Return how many of ``num_locations`` a fixed budget keeps, rounded down as published."""
    return int(num_locations * ratio)


def topk_mask(scores_BN: Tensor, ratio: float) -> Tensor:
    """Keep the ``int(N * ratio)`` best-scored locations of each image."""
    k = num_kept(scores_BN.shape[1], ratio)
    idx_BK = scores_BN.topk(k, dim=1, sorted=False).indices
    return torch.zeros_like(scores_BN).scatter_(1, idx_BK, 1.0)


def threshold_mask(scores_BN: Tensor, ratio: float) -> Tensor:
    """Keep where P(keep) > 0.5, the most probable outcome of the sampling that was trained.

    The number kept adapts to the image; ``ratio`` is only what training aimed at.
    """
    return (scores_BN.exp() > 0.5).float()


def mass_mask(scores_BN: Tensor, ratio: float) -> Tensor:
    """Keep the fewest locations that together hold ``ratio`` of the image's sum of P(keep)."""
    probs_BN, order_BN = scores_BN.exp().sort(dim=1, descending=True)
    mass_before_BN = probs_BN.cumsum(1) - probs_BN
    keep_BN = (mass_before_BN < ratio * probs_BN.sum(1, keepdim=True)).float()
    return torch.zeros_like(scores_BN).scatter_(1, order_BN, keep_BN)


def random_mask(scores_BN: Tensor, ratio: float) -> Tensor:
    """Keep ``int(N * ratio)`` random locations of each image, the control of what is learned.

    A location whose score is minus infinity is only kept when there are no others left.
    """
    noise_BN = torch.rand_like(scores_BN).masked_fill(scores_BN == -torch.inf, -1.0)
    return topk_mask(noise_BN, ratio)


SELECTORS: dict[str, Callable[[Tensor, float], Tensor]] = {
    'topk': topk_mask,
    'threshold': threshold_mask,
    'mass': mass_mask,
    'random': random_mask,
}
# Those that keep the same number of locations in every image.
FIXED_BUDGET = ('topk', 'random')


def _refuse_nan(scores_BN: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    if scores_BN.is_cuda:
        torch._assert_async(~scores_BN.isnan().any(), 'NaN among the keep scores')
    elif scores_BN.isnan().any():
        raise ValueError(
            'the predictor gave NaN scores, expected log-probabilities; '
            'check the input and the weights for NaN or infinite values'
        )


def _nonzero(flags: Tensor) -> Tensor:
    return flags.nonzero().squeeze(1)


def _positions(mask_BN: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sorted flat positions of the ones and zeros in ``mask_BN``; each row has ``count`` ones."""
    b, n = mask_BN.shape
    keep_BN = mask_BN > 0.5
    idx_BN = torch.arange(b * n, device=mask_BN.device).view(b, n)
    # Ones go to the front of their row and zeros behind them, each in order.
    rank_BN = keep_BN.cumsum(1)
    slot_BN = torch.where(keep_BN, rank_BN - 1, count + idx_BN[:1] - rank_BN)
    order_BN = torch.empty_like(idx_BN).scatter_(1, slot_BN, idx_BN)
    return order_BN[:, :count].flatten(), order_BN[:, count:].flatten()
