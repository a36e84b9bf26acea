"""Decisions about regions: the proposals and the detections of an image."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import Decision, keep_all
from .decider import Decider

LEAST_SCORE = 1e-12  # has a finite logarithm


def decide_regions(decider: Decider, scores: Sequence[Tensor]) -> Decision:
    """Decide by their scores which regions are kept, in each image by itself.

    Args:
        decider: Has the keep ratio and the selector.
        scores: Of the regions of each image, (N_i,), in [0, 1].

    Returns:
        A decision with one row for the regions of all images, (1, N). Of an image with regions it
        keeps at least the best one.
    """
    count = sum(map(len, scores))
    if decider.keeps_all():
        return keep_all(1, (1, count), scores[0].device)
    parts = [_decide_image(decider, scores_N) for scores_N in scores]
    mask, log_probs = (torch.cat(values, 1) for values in zip(*parts, strict=True))
    return Decision(mask, log_probs, (1, count), decider.keep_ratios[0])


def _decide_image(decider: Decider, scores_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return mask and scores (1, N) of the regions of one image."""
    scores_1N = scores_N.float().clamp(LEAST_SCORE, 1.0)[None]
    log_probs = torch.stack((scores_1N.log(), (-scores_1N).log1p()), -1)
    decision = decider.decide(log_probs, (1, len(scores_N)))
    mask = decision.mask
    if mask.shape[1] and not mask.any():
        mask[0, scores_N.argmax()] = 1.0
    return mask, decision.scores
