"""From a keep ratio and importance scores to a mask: which cells take the slow path.

Training samples with the straight-through Gumbel-softmax (Rao et al., T-PAMI 2023, section 3.2;
DynamicViT, eq. 5-7); inference selects without noise. Dimension letters: B images, N cells of an
image (row by row), K kept and M dropped cells of the whole batch.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .caching import cached
from .cells import cell_grid, cell_mask, cell_means
from .regions import region


class Decision(NamedTuple):
    """Which cells of a batch of feature maps take the slow path.

    A cell is a square of ``cell_size`` x ``cell_size`` locations. Cells at the right and bottom
    edge may reach beyond the map. With ``cell_size`` 1 a cell is one location.

    Attributes:
        mask: (B, N) float32, 1 where a cell is kept and 0 elsewhere; in training it carries the
            straight-through gradient of the predictor.
        scores: (B, N) float32, log P(keep).
        hw: Height and width of the map, in locations.
        ratio: Target keep ratio in (0, 1].
        cell_size: Side of a cell, in locations. Defaults to 1.
        count: How many cells are kept in each image, if the selector says so before it looks at
            the scores; None if it depends on them, or on samples. Defaults to None.
    """

    mask: Tensor
    scores: Tensor
    hw: tuple[int, int]
    ratio: float
    cell_size: int = 1
    count: int | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of cells, N of them together."""
        return cell_grid(self.hw, self.cell_size)

    @property
    def keeps_all(self) -> bool:
        """Whether the target is to keep every cell, that is, the dense computation."""
        return self.ratio >= 1


def keep_all(batch: int, hw: tuple[int, int], device: torch.device, cell_size: int = 1) -> Decision:
    """Return the decision that keeps every cell, made without a predictor."""
    rows, columns = cell_grid(hw, cell_size)
    ones_BN = torch.ones(batch, rows * columns, device=device)
    return Decision(ones_BN, torch.zeros_like(ones_BN), hw, 1.0, cell_size, rows * columns)


def sample_decision(
    log_probs_BN2: Tensor,
    hw: tuple[int, int],
    ratio: float,
    selector: str | Mapping = 'topk',
    cell_size: int = 1,
    exact: bool = False,
    among_BN: Tensor | None = None,
) -> Decision:
    """Sample a decision for training, with a gradient for the predictor.

    The mask is hard in the forward pass and the Gumbel-softmax probability in the backward pass.
    With ``ratio`` 1 every cell is kept without noise; the gradient that says how much keeping a
    cell helps still reaches the predictor.

    Args:
        log_probs_BN2: (B, N, 2) log-probabilities [keep, drop].
        hw: Height and width of the map, in locations.
        ratio: Target keep ratio in (0, 1].
        selector: How cells will be selected at inference. 'random' selects them so here too, and
            its gradient is zero; no other makes a difference. Defaults to 'topk'.
        cell_size: Side of a cell, in locations. Defaults to 1.
        exact: Whether exactly the ``int(N * ratio)`` cells of each image are kept that the noise
            makes most probable, whatever the probabilities add up to: for scores that serve
            several keep ratios. Their order is learned alone: the gradient is that of P(keep)
            with the odds of the last kept and the first dropped cell taken to be even, and zero
            with ``ratio`` 1. The decision's ratio is then that share, so that a ratio loss has no
            say. Defaults to False.
        among_BN: 1 for the cells that may be kept, 0 for others. Defaults to None, all.
    """
    log_probs_BN2 = log_probs_BN2.float()
    soft_BN = log_probs_BN2[..., 0].exp()
    if ratio >= 1:
        # Zero, but a part of the graph: distributed training wants a gradient for each parameter.
        soft_BN = 0 * soft_BN if exact else soft_BN
        hard_BN = torch.ones_like(soft_BN)
    elif selector == 'random':
        soft_BN = 0 * soft_BN
        hard_BN = random_mask(_only(log_probs_BN2[..., 0].detach(), among_BN), ratio)
    elif exact:
        soft_BN, hard_BN = _sample_order(log_probs_BN2, ratio, among_BN)
        ratio = num_kept(soft_BN.shape[1], ratio) / soft_BN.shape[1]
    else:
        soft_BN = F.gumbel_softmax(log_probs_BN2, dim=-1)[..., 0]
        hard_BN = (soft_BN > 0.5).float()
    # The bracket is exactly zero, so the mask is exactly 0 or 1.
    mask_BN = hard_BN + (soft_BN - soft_BN.detach())
    if among_BN is not None:
        mask_BN = mask_BN * among_BN
    return Decision(mask_BN, log_probs_BN2[..., 0], hw, ratio, cell_size)


def select_decision(
    log_probs_BN2: Tensor,
    hw: tuple[int, int],
    ratio: float,
    selector: str | Mapping = 'topk',
    cell_size: int = 1,
    among_BN: Tensor | None = None,
    among_ratio: float = 1.0,
    place: int = 0,
) -> Decision:
    """Select the kept cells of each image at inference.

    Args:
        log_probs_BN2: (B, N, 2) log-probabilities [keep, drop].
        hw: Height and width of the map, in locations.
        ratio: Target keep ratio in (0, 1], a share of all cells.
        selector: A name in ``SELECTORS``, or a dict of that as ``type`` and of the other arguments
            of one in ``CLAMPED``. Defaults to 'topk'.
        cell_size: Side of a cell, in locations. Defaults to 1.
        among_BN: 1 for the cells that may be kept, 0 for others. Defaults to None, all.
        among_ratio: Target share of all cells that ``among_BN`` has. The share of 'mass' and of
            'value' is ``ratio / among_ratio``: 'mass' keeps so much of the sum of P(keep) of these
            cells, so that cells of equal probability are kept in the same number as by 'topk'.
            Defaults to 1.
        place: Number of the decision, for 'sampled'. Defaults to 0.

    Raises:
        ValueError: If a score is NaN. On an accelerator the device assertion that stops the
            process instead costs no host synchronisation. Compiled and exported code does not
            look.
    """
    with region('selection'):
        scores_BN = log_probs_BN2[..., 0].float()
        _refuse_nan(scores_BN)
        scores_BN = _only(scores_BN, among_BN)
        limits = dict(type=selector) if isinstance(selector, str) else dict(selector)
        name = limits.pop('type')
        share = min(ratio / among_ratio, 1.0) if name in CLAMPED else ratio
        if name == 'sampled':
            limits['place'] = place
        mask_BN = SELECTORS[name](scores_BN, share, **limits)
        count = num_kept(mask_BN.shape[1], ratio) if name in FIXED_BUDGET else None
        return Decision(mask_BN, scores_BN, hw, ratio, cell_size, count)


def kept_and_dropped(decision: Decision) -> tuple[Tensor, Tensor]:
    """Return the positions of the kept and of the dropped cells.

    Returns:
        Kept (K,) and dropped (M,) int64 positions in the flattened (B * N) batch of cells, sorted,
        K + M = B * N. Shapes are static, and nothing waits for the device, if the decision has a
        ``count``.
    """
    mask_BN = decision.mask.detach()
    if decision.count is not None:
        return _positions(mask_BN, decision.count)
    keep = mask_BN.flatten() > 0.5
    return _nonzero(keep), _nonzero(~keep)


def location_mask(decision: Decision) -> Tensor:
    """Return the mask over the locations of the map, (B, H * W)."""
    return _spread(decision.mask, decision)


def location_scores(decision: Decision) -> Tensor:
    """Return the scores over the locations of the map, (B, H * W)."""
    return _spread(decision.scores, decision)


def resize_scores(
    scores_BN: Tensor, hw: tuple[int, int], new_hw: tuple[int, int], cell_size: int = 1
) -> Tensor:
    """Carry scores over to a map of another size.

    What is averaged or interpolated are logits, log P(keep) - log P(drop).

    Args:
        scores_BN: log P(keep), (B, N); what is below -20 or above -1e-6 counts as that.
        hw: Height and width of their map.
        new_hw: Height and width of the other map, which shows the same area.
        cell_size: Side of the cells of the other map that get a score, in locations. Defaults to
            1, its locations.

    Returns:
        (B, N', 2) log-probabilities [keep, drop], one pair for each cell.
    """
    logits = log_odds(scores_BN).unflatten(1, hw).unsqueeze(1)
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


def mass_mask(scores_BN: Tensor, share: float, least: float = 0.0, most: float = 1.0) -> Tensor:
    """Keep the fewest locations that together hold ``share`` of the image's sum of P(keep).

    Args:
        scores_BN: log P(keep), -inf for locations that may not be kept.
        share: Of the sum, in (0, 1].
        least: Smallest share of all locations that is kept, but at least one location and no more
            than may be. Defaults to 0.
        most: Largest share. Defaults to 1.
    """
    probs_BN, order_BN = _falling(scores_BN)
    mass_before_BN = probs_BN.cumsum(1) - probs_BN
    # The sum of equal values may round to slightly less than it is.
    mass_B1 = share * (1 - 1e-6) * probs_BN.sum(1, keepdim=True)
    return _clamped(scores_BN, order_BN, mass_before_BN < mass_B1, least, most)


def value_mask(scores_BN: Tensor, share: float, least: float = 0.0, most: float = 1.0) -> Tensor:
    """Keep where P(keep) is at least ``1 / share - 1`` times its mean over the image.

    That is 0 times, everything, at share 1, and once the mean at 0.5. The mean is over the
    locations that may be kept. Arguments as of :func:`mass_mask`.
    """
    probs_BN, order_BN = _falling(scores_BN)
    total_B1, count_B1 = (x.sum(1, keepdim=True) for x in (probs_BN, scores_BN > -torch.inf))
    # Equal values may round to slightly less than their mean.
    keep_BN = probs_BN * count_B1 >= (1 / share - 1) * (1 - 1e-6) * total_B1
    return _clamped(scores_BN, order_BN, keep_BN, least, most)


def sampled_mask(scores_BN: Tensor, ratio: float, place: int = 0) -> Tensor:
    """Keep as many as :func:`topk_mask`, but as training samples them, with noise that is fixed.

    By 'topk' what one decision of a model drops, most others drop as well, so that some locations
    never take the slow path. Noise changes the order, and in each decision otherwise.

    Args:
        scores_BN: log P(keep), -inf for locations that may not be kept.
        ratio: Share of all locations that is kept.
        place: Number of the decision. Defaults to 0.
    """
    noisy_BN = log_odds(scores_BN) + _even_noise(scores_BN.shape[1], place, scores_BN.device)
    return topk_mask(noisy_BN.masked_fill(scores_BN == -torch.inf, -torch.inf), ratio)


@cached
def _even_noise(n: int, place: int, device: torch.device) -> Tensor:
    """Return logistic noise (N,), as the difference of two Gumbel variables is."""
    # Multiples of the golden ratio, in 16 bits, lie evenly among neighbours.
    at_N = torch.arange(n, device=device) * 40503 + place * 49471
    return ((at_N % 2**16 + 0.5) / 2**16).logit()


def log_odds(scores: Tensor) -> Tensor:
    """Return log P(keep) - log P(drop) of log P(keep), within -20 and -1e-6."""
    scores = scores.float().clamp(-20.0, -1e-6)
    return scores - (-scores.expm1()).log()


def random_mask(scores_BN: Tensor, ratio: float) -> Tensor:
    """Keep ``int(N * ratio)`` random locations of each image, the control of what is learned.

    A location whose score is minus infinity is only kept when there are no others left.
    """
    noise_BN = torch.rand_like(scores_BN).masked_fill(scores_BN == -torch.inf, -1.0)
    return topk_mask(noise_BN, ratio)


SELECTORS: dict[str, Callable[..., Tensor]] = {
    'topk': topk_mask,
    'sampled': sampled_mask,
    'threshold': threshold_mask,
    'mass': mass_mask,
    'value': value_mask,
    'random': random_mask,
}
# Those that keep the same number of locations in every image.
FIXED_BUDGET = ('topk', 'sampled', 'random')
# Those that take a smallest and a largest share.
CLAMPED = ('mass', 'value')


def _falling(scores_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Return P(keep) in falling order, and that order, in which equals stay as they were."""
    scores_BN, order_BN = scores_BN.sort(dim=1, descending=True, stable=True)
    return scores_BN.exp(), order_BN


def _clamped(
    scores_BN: Tensor, order_BN: Tensor, keep_BN: Tensor, least: float, most: float
) -> Tensor:
    """Return the mask of the first of an order, as many as ``keep_BN`` has ones, within limits."""
    n = scores_BN.shape[1]
    # Rounded, because 0.07 of 100 in binary is just above 7.
    low, high = math.ceil(round(n * least, 6)), math.floor(round(n * most, 6))
    count_B1 = keep_BN.sum(1, keepdim=True).clamp(max(low, 1), max(high, 1))
    count_B1 = count_B1.minimum((scores_BN > -torch.inf).sum(1, keepdim=True))
    first_BN = (torch.arange(n, device=scores_BN.device) < count_B1).float()
    return torch.zeros_like(scores_BN).scatter_(1, order_BN, first_BN)


def _sample_order(
    log_probs_BN2: Tensor, ratio: float, among_BN: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the soft and the hard mask (B, N) of exactly ``int(N * ratio)`` sampled cells."""
    noisy_BN2 = log_probs_BN2 - torch.empty_like(log_probs_BN2).exponential_().log()
    odds_BN = _only(noisy_BN2[..., 0] - noisy_BN2[..., 1], among_BN)
    fixed_BN = odds_BN.detach()
    hard_BN = topk_mask(fixed_BN, ratio)
    last_kept_B1 = fixed_BN.masked_fill(hard_BN == 0, torch.inf).amin(1, keepdim=True)
    first_dropped_B1 = fixed_BN.masked_fill(hard_BN == 1, -torch.inf).amax(1, keepdim=True)
    # Finite, also where all cells that may be kept are.
    even_B1 = (last_kept_B1 + first_dropped_B1.clamp(min=-1e9)) / 2
    return (odds_BN - even_B1).sigmoid(), hard_BN


def _only(scores_BN: Tensor, among_BN: Tensor | None) -> Tensor:
    return scores_BN if among_BN is None else scores_BN.masked_fill(among_BN == 0, -torch.inf)


def _spread(values_BN: Tensor, decision: Decision) -> Tensor:
    if decision.cell_size == 1:
        return values_BN
    return cell_mask(values_BN, decision.hw, decision.cell_size).flatten(1)


def _refuse_nan(scores_BN: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    if scores_BN.device.type != 'cpu':
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
