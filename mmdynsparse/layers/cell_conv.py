"""Convolutions of necks and heads in the kept cells of a map.

A 3 x 3 convolution without padding on a cell with a halo of one position gives the cell's outputs.
Rows and tiles are those of ``ops.cells``. Dimension letters: B images, C channels, K kept cells of
g x g positions, R rows that the tiles read.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from torch import Tensor

from ..ops import (
    CellRows,
    Plan,
    cell_grid,
    cell_rows,
    cell_table,
    is_exporting,
    region,
    row_tiles,
    take_tiles,
    tile_rows,
)
from .conv_module import conv_module


class KeptCells(NamedTuple):
    """The kept cells of a batch of maps.

    Attributes:
        index: (K,) int64, their sorted positions in the flattened (B * N) batch of cells.
        rows: What they hold and read, with a halo of 1.
        size: Side g of a cell, in positions.
    """

    index: Tensor
    rows: CellRows
    size: int

    def tiles_of_map(self, x_BCHW: Tensor) -> Tensor:
        """Return the cells of a map with their halo, (K, C, g + 2, g + 2)."""
        with region('gather'):
            return take_tiles(cell_table(x_BCHW), self.rows.tile, self.size + 2)

    def tiles_of_table(self, table_PC: Tensor) -> Tensor:
        """Return the cells with their halo from a table as of ``cell_table``."""
        with region('gather'):
            return take_tiles(table_PC, self.rows.tile, self.size + 2)

    def lateral_tiles(
        self, x_BCHW: Tensor, lateral: ConvModule, enlarged_rows: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return the cells of a level of a feature pyramid before its 3 x 3 convolution.

        Args:
            x_BCHW: The map that the level's lateral convolution reads.
            lateral: That 1 x 1 convolution; it runs where a tile reads it.
            enlarged_rows: Returns chosen rows of the next level, enlarged, as a new tensor.

        Returns:
            Tiles of the sum of both, (K, C, g + 2, g + 2).
        """
        with region('gather'):
            near_RC = channels_last(x_BCHW).permute(0, 2, 3, 1).flatten(0, 2)
            near_RC = near_RC.index_select(0, self.rows.near)
        with region('slow path'):
            near_RC = pointwise_rows(near_RC, lateral)
        if is_exporting():  # each position of a tile has a row of its own
            inside_R1 = (self.rows.tile < x_BCHW[:, 0].numel()).unsqueeze(1)
            sums = (enlarged_rows(self.rows.near) + near_RC) * inside_R1
            return row_tiles(sums, self.size + 2)
        with region('gather'):
            # One more row, of zeros, for the padding; in place, because another table of this
            # size costs page faults.
            sums = enlarged_rows(F.pad(self.rows.near, (0, 1)))
            sums[:-1] += near_RC
            sums[-1].zero_()
            return take_tiles(sums, self.rows.tile_of_near, self.size + 2)


def kept_cells(plan: Plan, x_BCHW: Tensor, level: int = 0) -> KeptCells:
    """Find the kept cells of a map.

    Args:
        plan: Gathers the cells of a decision about the finest map.
        x_BCHW: The map of a level.
        level: How often it is half as large as the finest map. Defaults to 0.
    """
    size = plan.decision.cell_size >> level
    with region('gather'):
        rows = cell_rows(plan.kept, x_BCHW.shape[0], tuple(x_BCHW.shape[2:]), size, halo=1)
    return KeptCells(plan.kept, rows, size)


def pointwise_rows(rows_RC: Tensor, module: ConvModule) -> Tensor:
    """Apply a 1 x 1 convolution, with what follows it, to rows (R, C_in) -> (R, C_out)."""
    # As one image of R x 1 positions: R images of one position are several times slower.
    image = rows_RC.view(1, -1, 1, rows_RC.shape[1]).permute(0, 3, 1, 2)
    return tile_rows(conv_module(module, image))


def channels_last(x_BCHW: Tensor) -> Tensor:
    """Return a map channels last in memory: its rows are then contiguous."""
    return x_BCHW.contiguous(memory_format=torch.channels_last)


def check_half_size(
    part: str, first: tuple[int, int], second: tuple[int, int], cell_size: int, level: int = 0
) -> None:
    """Raise a ValueError if cells of two maps of a part do not cover the same area.

    Cells have a side of ``cell_size`` on the map of a level, and half of it on the next one.
    """
    if cell_grid(second, cell_size // 2) != cell_grid(first, cell_size):
        names = ('first', 'second', 'third')
        raise ValueError(
            f'the {names[level + 1]} map of a sparse {part} must have half the height and width of '
            f'the {names[level]}, got {second} for {first}'
        )
