"""Bilinear enlargement of a map at chosen rows only.

Rows are those of ``ops.cells``: positions of a batch of maps, image by image and row by row.
Dimension letters: B images, C channels, P = B * H * W rows of the large map, R chosen ones.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .caching import cached
from .rows import is_exporting


def enlarge_rows(
    x_BCHW: Tensor, rows_R: Tensor, hw: tuple[int, int], align_corners: bool = False
) -> Tensor:
    """Return chosen rows of a map resized to ``hw``, (R, C), without resizing the rest.

    The values are those of ``F.interpolate(x, hw, mode='bilinear')``.

    Args:
        x_BCHW: The small map; no copy is made if it is channels last in memory.
        rows_R: int64 rows of the large map; those beyond its end give the last row's values.
        hw: Height and width of the large map.
        align_corners: As of ``F.interpolate``. Defaults to False.
    """
    b, c, *small = x_BCHW.shape
    table = x_BCHW.permute(0, 2, 3, 1).reshape(-1, c)
    corners_P4, weights_P4 = _corners(b, hw, tuple(small), align_corners, x_BCHW.device)
    rows_R = rows_R.clamp(max=corners_P4.shape[0] - 1)
    weights_R4 = weights_P4.index_select(0, rows_R).to(table.dtype)
    corners_R4 = corners_P4.index_select(0, rows_R)
    if is_exporting():
        # ONNX has no embedding_bag: it becomes a loop over rows.
        pairs = zip(corners_R4.unbind(1), weights_R4.unbind(1), strict=True)
        return sum(table.index_select(0, rows) * weight.unsqueeze(1) for rows, weight in pairs)
    return F.embedding_bag(corners_R4, table, per_sample_weights=weights_R4, mode='sum')


def enlarge_cells(x_BCHW: Tensor, cells_K: Tensor, size: int, halo: int) -> Tensor:
    """Return chosen cells of a map resized bilinearly to twice its size, (K * G * G, C).

    Each is the product of one small matrix with what the cell reads, two operators where
    :func:`enlarge_rows` is eleven in ONNX.

    Args:
        x_BCHW: The small map.
        cells_K: int64 positions in the flattened (B * N) batch of cells of the large map. What
            lies outside of it is of no meaning.
        size: Side of a cell on the large map, an even number.
        halo: Width of the border that is added on each side, 0 or 1; G = size + 2 * halo.
    """
    b, c, h, w = x_BCHW.shape
    device, side = x_BCHW.device, size // 2 + 2
    around = torch.arange(-1, side - 1, device=device)
    ys, xs = (
        (torch.arange(-(-2 * n // size), device=device).unsqueeze(1) * (size // 2) + around).clamp(
            0, n - 1
        )
        for n in (h, w)
    )
    image = torch.arange(b, device=device).view(-1, 1, 1, 1, 1) * (h * w)
    rows = image + ys[:, None, :, None] * w + xs[:, None]  # (B, rows, columns, side, side)
    rows = rows.flatten(3).flatten(0, 2).index_select(0, cells_K).flatten()
    small_KSC = x_BCHW.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, rows).view(-1, side**2, c)
    at = torch.arange(-halo, size + halo, device=device) / 2 + 0.75
    axis = (1 - (at.unsqueeze(1) - torch.arange(side, device=device)).abs()).clamp(min=0)
    weights = (axis[:, None, :, None] * axis[:, None]).flatten(2).flatten(0, 1)
    return (weights.to(x_BCHW.dtype) @ small_KSC).flatten(0, 1)


@cached
def _corners(
    batch: int,
    hw: tuple[int, int],
    small: tuple[int, int],
    align_corners: bool,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Rows of the small map that each row of the large map reads and their weights, (P, 4)."""
    (y0, y1, wy), (x0, x1, wx) = (
        _axis(n, m, align_corners, device) for n, m in zip(hw, small, strict=True)
    )
    rows = [y[:, None] * small[1] + x for y in (y0, y1) for x in (x0, x1)]
    weights = [y[:, None] * x for y in (1 - wy, wy) for x in (1 - wx, wx)]
    first = torch.arange(batch, device=device).view(-1, 1, 1) * (small[0] * small[1])
    corners = first + torch.stack(rows, -1).view(1, -1, 4)
    return corners.view(-1, 4), torch.stack(weights, -1).view(-1, 4).repeat(batch, 1)


def _axis(
    size: int, small: int, align_corners: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """For each of ``size`` positions the two it reads of ``small`` and the second one's weight."""
    at = torch.arange(size, device=device, dtype=torch.float32)
    if align_corners:
        at = at * ((small - 1) / max(size - 1, 1))
    else:
        at = ((at + 0.5) * (small / size) - 0.5).clamp(min=0)
    before = at.floor().long().clamp(max=small - 1)
    return before, (before + 1).clamp(max=small - 1), at - before
