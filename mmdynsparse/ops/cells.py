"""Convolution in chosen cells of a map: which rows it reads and writes.

A map (B, C, H, W) in channels-last memory is a table of P = B * H * W rows of C channels. Cells are
squares of g x g positions; those at the right and bottom edge may reach beyond the map. Tiles are
cells with a halo, so that a stock convolution without padding gives a cell's outputs. Dimension
letters: B images, C channels, K kept cells, N cells of an image, R rows.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .caching import cached
from .rows import is_exporting, put_rows, shapes_may_vary


class CellRows(NamedTuple):
    """Rows of a chosen set of cells in the table of :func:`cell_table`.

    Attributes:
        inner: (K * g * g,) int64, the positions of the cells; P + 1 outside of the map.
        tile: (K * G * G,) int64, the same with a halo, G = g + 2 * halo; P outside of the map.
        near: (R,) int64, rows of the map that lie in any tile: on these a pointwise layer that
            comes before the convolution is evaluated.
        tile_of_near: (K * G * G,) int64, the tiles as positions in ``near``; R outside of the map.
    """

    inner: Tensor
    tile: Tensor
    near: Tensor
    tile_of_near: Tensor


def cell_grid(hw: tuple[int, int], size: int) -> tuple[int, int]:
    """Return the rows and columns of cells of ``size`` x ``size`` positions that cover a map."""
    return -(-hw[0] // size), -(-hw[1] // size)


def cell_means(x_BCHW: Tensor, size: int) -> Tensor:
    """Return the mean of each cell over its positions in the map, (B, N, C)."""
    if size == 1:
        return x_BCHW.flatten(2).transpose(1, 2)
    means = F.avg_pool2d(x_BCHW, size, ceil_mode=True, count_include_pad=False)
    return means.flatten(2).transpose(1, 2)


def cell_mask(mask_BN: Tensor, hw: tuple[int, int], size: int) -> Tensor:
    """Spread a mask over cells to the positions of the map, (B, 1, H, W)."""
    mask = mask_BN.view(-1, 1, *cell_grid(hw, size))
    mask = mask.repeat_interleave(size, 2).repeat_interleave(size, 3)
    return mask[:, :, : hw[0], : hw[1]]


def cell_positions(cells_K: Tensor, batch: int, hw: tuple[int, int], size: int) -> Tensor:
    """Return the positions of chosen cells in the flattened (B * H * W) batch of maps, (R,) int64.

    They come cell by cell. Where shapes may not depend on values (``shapes_may_vary``) each cell
    has ``size ** 2`` of them: a cell at the edge repeats its first position.
    """
    rows = rows_of_cells(batch, hw, size, 0, cells_K.device).index_select(0, cells_K)
    if hw[0] % size == 0 and hw[1] % size == 0:
        return rows.flatten()
    inside = rows < batch * hw[0] * hw[1]
    if shapes_may_vary(rows.device):
        return rows[inside]
    return rows.where(inside, rows[:, :1]).flatten()


def cell_rows(cells_K: Tensor, batch: int, hw: tuple[int, int], size: int, halo: int) -> CellRows:
    """Look up the rows of chosen cells.

    Args:
        cells_K: Sorted positions in the flattened (B * N) batch of cells, int64.
        batch: Number of images.
        hw: Height and width of the maps.
        size: Side g of a cell, in positions.
        halo: Width of the border that a tile adds on each side.
    """
    rows, device = batch * hw[0] * hw[1], cells_K.device
    inner = rows_of_cells(batch, hw, size, 0, device).index_select(0, cells_K).flatten()
    tile = rows_of_cells(batch, hw, size, halo, device).index_select(0, cells_K).flatten()
    inner = torch.where(inner == rows, rows + 1, inner)
    if not shapes_may_vary(device):
        # A row that lies in several tiles counts once for each.
        slots = torch.arange(tile.shape[0], device=device)
        tile_of_near = torch.where(tile == rows, tile.shape[0], slots)
        return CellRows(inner, tile, tile.clamp(max=rows - 1), tile_of_near)
    covered = torch.zeros(rows + 1, dtype=torch.bool, device=device).index_fill_(0, tile, True)
    near = covered[:rows].nonzero().squeeze(1)
    slots = torch.full((rows + 1,), len(near), device=device)
    slots = slots.index_copy_(0, near, torch.arange(len(near), device=device))
    return CellRows(inner, tile, near, slots.index_select(0, tile))


def cell_table(x_BCHW: Tensor) -> Tensor:
    """Copy a map to a table of rows, (P + 2, C).

    Row P is zero, as the padding of a convolution is; row P + 1 takes what is computed for
    positions outside of the map.
    """
    b, c, h, w = x_BCHW.shape
    if is_exporting():
        return F.pad(x_BCHW.permute(0, 2, 3, 1).flatten(0, 2), (0, 0, 0, 2))
    table = x_BCHW.new_empty(b * h * w + 2, c)
    table_map(table, b, (h, w)).copy_(x_BCHW)
    table[-2:].zero_()
    return table


def table_map(table: Tensor, batch: int, hw: tuple[int, int]) -> Tensor:
    """Return the map (B, C, H, W) that a table holds, a view in channels-last memory."""
    return table[:-2].view(batch, *hw, -1).permute(0, 3, 1, 2)


def sparse_table(values_RC: Tensor, rows_R: Tensor, positions: int) -> Tensor:
    """Return a table as of :func:`cell_table` of which only some rows, and the zeros, are filled.

    The others are not initialized, and memory that nothing touches costs nothing.

    Args:
        values_RC: What the rows hold.
        rows_R: int64, which they are.
        positions: Number P of positions of the maps.
    """
    table = values_RC.new_empty(positions + 2, values_RC.shape[1])
    put_rows(table, rows_R, values_RC)
    table[positions].zero_()
    return table


def put_tiles(x_BCHW: Tensor, cells_K: Tensor, tiles_KCgg: Tensor) -> Tensor:
    """Replace cells of a map that is contiguous (not channels last) in memory.

    Args:
        x_BCHW: The map; it is changed in place where cells divide it.
        cells_K: int64 positions in the flattened (B * N) batch of cells.
        tiles_KCgg: Their new content.

    Returns:
        The map (B, C, H, W), contiguous.
    """
    size = tiles_KCgg.shape[-1]
    h, w = x_BCHW.shape[2:]
    grid_h, grid_w = cell_grid((h, w), size)
    right, below = grid_w * size - w, grid_h * size - h
    padded = F.pad(x_BCHW, (0, right, 0, below)) if right or below else x_BCHW
    cells = padded.unflatten(3, (grid_w, size)).unflatten(2, (grid_h, size))
    image, cell = cells_K // (grid_h * grid_w), cells_K % (grid_h * grid_w)
    cells[image, :, cell // grid_w, :, cell % grid_w] = tiles_KCgg
    return padded[:, :, :h, :w].contiguous()


def take_tiles(table: Tensor, rows: Tensor, side: int) -> Tensor:
    """Gather rows into tiles (K, C, side, side), channels last in memory."""
    return row_tiles(table.index_select(0, rows), side)


def row_tiles(rows_RC: Tensor, side: int) -> Tensor:
    """View rows as tiles (K, C, side, side), channels last in memory."""
    return rows_RC.view(-1, side, side, rows_RC.shape[1]).permute(0, 3, 1, 2)


def tile_rows(tiles_KCGG: Tensor) -> Tensor:
    """Flatten tiles to rows (K * G * G, C), the inverse of :func:`row_tiles`."""
    return tiles_KCGG.permute(0, 2, 3, 1).reshape(-1, tiles_KCGG.shape[1])


@cached
def rows_of_cells(
    batch: int, hw: tuple[int, int], size: int, halo: int, device: torch.device
) -> Tensor:
    """Row of every position of every tile, (B * N, G * G) int64; P outside of the map."""
    h, w = hw
    grid_h, grid_w = cell_grid(hw, size)
    side = torch.arange(-halo, size + halo, device=device)
    ys = torch.arange(grid_h, device=device).view(-1, 1, 1, 1) * size + side.view(-1, 1)
    xs = torch.arange(grid_w, device=device).view(-1, 1, 1) * size + side
    inside = (ys >= 0) & (ys < h) & (xs >= 0) & (xs < w)
    image = torch.arange(batch, device=device).view(-1, 1, 1, 1, 1) * (h * w)
    rows = torch.where(inside, image + ys * w + xs, batch * h * w)
    return rows.flatten(3).flatten(0, 2)
