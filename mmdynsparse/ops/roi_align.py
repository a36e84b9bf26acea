"""RoIAlign as two matrix products for each region.

Source: He et al., *Mask R-CNN* (arXiv 1703.06870, section 3), with the values of ``RoIAlign`` of
mmcv 2.x. A bin is the mean of bilinear samples on a grid, so its weights are those of its row times
those of its column: a region is W_y X W_x^T. A library that samples point by point reads every
position several times. Dimension letters: R regions, P bins of an axis, G samples of a bin of an
axis, L positions of an axis that a region needs, C channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class _Axis(NamedTuple):
    """How the bins of regions read one axis of a map."""

    weights: Tensor  # (R, P, L), of the positions from ``first`` on
    first: Tensor  # (R,) int64
    length: Tensor  # (R,) int64, positions that are read


def roi_align(
    x_BCHW: Tensor,
    rois_R5: Tensor,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """Average the features of regions in bins.

    Args:
        x_BCHW: The map.
        rois_R5: Regions: image of the batch, x1, y1, x2, y2 (px of the image).
        output_size: Bins of a region, rows and columns.
        spatial_scale: Positions of the map per px of the image.
        sampling_ratio: Samples of a bin in each direction; 0 is one for each position. Defaults
            to 0.
        aligned: Whether a position is the centre of its pixels. Defaults to True.

    Returns:
        (R, C, *output_size), channels last in memory.
    """
    height, width = x_BCHW.shape[2:]
    channels = x_BCHW.shape[1]
    table = x_BCHW.permute(0, 2, 3, 1).contiguous().view(-1)
    out = x_BCHW.new_empty(len(rois_R5), *output_size, channels)
    if len(rois_R5) == 0:
        return out.permute(0, 3, 1, 2)
    box = rois_R5[:, 1:] * spatial_scale - (0.5 if aligned else 0.0)
    least = 0.0 if aligned else 1.0
    rows = _axis(box[:, 1], box[:, 3], height, output_size[0], sampling_ratio, least)
    columns = _axis(box[:, 0], box[:, 2], width, output_size[1], sampling_ratio, least)
    start = ((rois_R5[:, 0].long() * height + rows.first) * width + columns.first) * channels
    places = zip(start.tolist(), rows.length.tolist(), columns.length.tolist(), strict=True)
    for i, (begin, h, w) in enumerate(places):
        window = table.as_strided((h, w * channels), (width * channels, 1), begin)
        mixed = (rows.weights[i, :, :h] @ window).view(-1, w, channels)
        torch.matmul(columns.weights[i, :, :w], mixed, out=out[i])
    return out.permute(0, 3, 1, 2)


def _axis(
    low_R: Tensor, high_R: Tensor, size: int, bins: int, sampling_ratio: int, least: float
) -> _Axis:
    """Return the weights of regions from ``low_R`` to ``high_R`` along an axis of ``size``."""
    side_R = (high_R - low_R).clamp(min=least)
    samples_R = torch.ceil(side_R / bins)
    if sampling_ratio > 0:
        samples_R = torch.full_like(side_R, sampling_ratio)
    samples_R11, step_R11 = samples_R[:, None, None], (side_R / bins)[:, None, None]
    number_G = torch.arange(max(int(samples_R.max()), 1), device=low_R.device)
    bin_P1 = torch.arange(bins, device=low_R.device)[:, None]
    share_R11 = 1 / samples_R11.clamp(min=1)
    at_RPG = low_R[:, None, None] + (bin_P1 + (number_G + 0.5) * share_R11) * step_R11
    # Samples beyond the map by more than one position count as zeros.
    counts = (number_G < samples_R11) & (at_RPG >= -1) & (at_RPG <= size)
    at_RPG = at_RPG.clamp(0, size - 1)
    below = at_RPG.floor()
    part = at_RPG - below
    below = below.long()
    above = (below + 1).clamp(max=size - 1)
    first_R = below.masked_fill(~counts, size - 1).amin((1, 2))
    last_R = above.masked_fill(~counts, 0).amax((1, 2)).maximum(first_R)
    length_R = last_R - first_R + 1
    weight = counts * share_R11
    weights = at_RPG.new_zeros(*at_RPG.shape[:2], int(length_R.max()))
    for index, value in ((below, weight * (1 - part)), (above, weight * part)):
        # What does not count has the weight 0 anywhere.
        index = (index - first_R[:, None, None]).clamp(0, weights.shape[2] - 1)
        weights.scatter_add_(2, index, value)
    return _Axis(weights, first_R, length_R)
