"""FPN whose two finest levels are computed in kept cells.

Source: Lin et al., *Feature Pyramid Networks* (arXiv 1612.03144), as ``FPN`` of mmdetection 3.x,
whose arguments and state-dict names it has. What is sparse is our own, after Rao et al. (T-PAMI
2023, arXiv 2207.01580). Dimension letters: B images, C channels, N cells of an image, K kept ones,
R rows (see ``ops.cells``).
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from mmdet.models.necks import FPN
from torch import Tensor

from ...layers.conv_module import check_conv_modules, conv_module
from ...ops import (
    Decision,
    cell_grid,
    cell_mask,
    cell_means,
    cell_rows,
    cell_table,
    put_tiles,
    region,
    take_tiles,
    tile_rows,
    with_positions,
)
from ...ops.caching import cached
from ...registry import MODELS
from ..decider import CellSparsity, Decider
from ..features import with_decisions

SPARSE_LEVELS = 2


@MODELS.register_module()
class SparseFPN(FPN):
    """FPN that computes its two finest levels, most of its cost, in kept cells.

    A predictor decides from the second level's lateral map, after the top-down path, or the
    scores of a sparse backbone's predictors do, which come with its feature maps. Kept cells
    of the first two levels get their 3 x 3 convolution, the others the next coarser level's
    output, enlarged: it stands for the same features at a lower resolution. The output carries
    the decision, which a ``SparseRPNHead`` may use as well.

    Args:
        sparsity: Arguments of :class:`~mmdynsparse.models.decider.CellSparsity`; by default the
            predictor is a ``mmdynsparse.CellPredictor``. None is the dense neck. Defaults to
            None.
        **kwargs: Arguments of mmdet's ``FPN``.

    Raises:
        ValueError: If ``sparsity`` is not valid, there are fewer than three levels, maps are not
            enlarged by ``dict(mode='nearest')``, or a norm is no batch norm.
    """

    original: ClassVar[str] = 'FPN'

    def __init__(self, sparsity: Mapping | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        self.decider = None
        if sparsity is None:
            return
        predictor = dict(type='mmdynsparse.CellPredictor')
        cells = CellSparsity.from_cfg(dict(predictor=predictor) | dict(sparsity))
        check_conv_modules(self, 'conv_cfg and norm_cfg')
        if len(self.lateral_convs) <= SPARSE_LEVELS:
            raise ValueError(
                f'a sparse FPN must have at least {SPARSE_LEVELS + 1} levels, '
                f'got {len(self.lateral_convs)}'
            )
        if self.upsample_cfg != dict(mode='nearest'):
            raise ValueError(
                f"upsample_cfg must be dict(mode='nearest') in a sparse FPN, "
                f'got {self.upsample_cfg}'
            )
        if cells.predictor is None:
            raise ValueError(
                "sparsity.predictor must be a config or 'backbone' in a sparse FPN, got None"
            )
        self.cell_size = cells.cell_size
        self.decider = Decider(cells, self.out_channels)

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the maps (B, C, H_i, W_i) of all levels, contiguous in memory.

        RoIAlign of mmcv reads a map that is channels last in memory wrongly.
        """
        if self.decider is None:
            return super().forward(inputs)
        if len(inputs) != len(self.in_channels):
            raise ValueError(
                f'inputs must be one map for each of in_channels {self.in_channels}, '
                f'got {len(inputs)} maps'
            )
        maps = inputs[self.start_level : self.backbone_end_level]
        hw = tuple(maps[0].shape[2:])
        decision = self.decider.known(inputs, hw, self.cell_size)
        if decision is not None and decision.keeps_all:
            outs = (x.contiguous() for x in super().forward(inputs))
            return with_decisions(outs, [decision], self.cell_size)
        laterals = self._laterals(maps)
        _check_sizes(hw, tuple(laterals[0].shape[2:]), self.cell_size)
        if decision is None:
            cells_BNC = cell_means(laterals[0], self.cell_size // 2)
            decision = self.decider(cells_BNC, cell_grid(hw, self.cell_size))
        outs = self._coarse_outs(laterals[1:])
        outs.insert(0, self._out(1, laterals[0], None, outs[0], decision))
        outs.insert(0, self._out(0, maps[0], laterals[0], outs[0], decision))
        outs = self._with_extra(outs, inputs, laterals)
        return with_decisions(outs, [decision], self.cell_size)

    def _laterals(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Lateral maps of the second level (which comes first) and of the coarser ones."""
        laterals = [conv_module(self.lateral_convs[-1], self._in_memory(maps[-1]))]
        for x, conv in zip(maps[-2:0:-1], self.lateral_convs[-2:0:-1], strict=True):
            x = conv_module(conv, self._in_memory(x))
            laterals.insert(0, x + F.interpolate(laterals[0], x.shape[2:]))
        return laterals

    def _in_memory(self, x: Tensor) -> Tensor:
        return x if self.training else x.contiguous(memory_format=torch.channels_last)

    def _coarse_outs(self, laterals: list[Tensor]) -> list[Tensor]:
        convs = self.fpn_convs[SPARSE_LEVELS : len(self.lateral_convs)]
        pairs = zip(convs, laterals, strict=True)
        return [conv_module(conv, x).contiguous() for conv, x in pairs]

    def _out(
        self, level: int, x: Tensor, coarse: Tensor | None, light: Tensor, decision: Decision
    ) -> Tensor:
        """Return the output of a sparse level.

        Args:
            level: 0 or 1.
            x: The level's lateral map, or where ``coarse`` is given the map it is computed from.
            coarse: Lateral map of the next level, whose enlargement is added to this one's.
            light: Output of the next level.
            decision: Which cells are kept.
        """
        hw = tuple(x.shape[2:])
        size = self.cell_size >> level
        if self.decider.gathers:
            return self._in_cells(level, x, coarse, light, decision, size)
        if coarse is not None:
            x = conv_module(self.lateral_convs[level], x) + F.interpolate(coarse, hw)
        x = conv_module(self.fpn_convs[level], x)
        mask = cell_mask(decision.mask, hw, size).to(x.dtype)
        return (x * mask + F.interpolate(light, hw) * (1 - mask)).contiguous()

    def _in_cells(
        self,
        level: int,
        x: Tensor,
        coarse: Tensor | None,
        light: Tensor,
        decision: Decision,
        size: int,
    ) -> Tensor:
        batch, hw = len(x), tuple(x.shape[2:])
        if decision.kept is None:
            decision = with_positions(decision)
        if len(decision.kept) == 0:
            return F.interpolate(light, hw)
        with region('gather'):
            rows = cell_rows(decision.kept, batch, hw, size, halo=1)
        if coarse is None:
            with region('gather'):
                tiles = take_tiles(cell_table(x), rows.tile, size + 2)
        else:
            near = self._lateral_rows(level, x, coarse, rows.near)
            with region('gather'):
                tiles = take_tiles(near, rows.tile_of_near, size + 2)
        with region('slow path'):
            tiles = conv_module(self.fpn_convs[level], tiles, padding=0)
        with region('scatter'):
            # Not enlarged before: the rows of above take as much memory, which is free by now.
            light = F.interpolate(light, hw)
            return put_tiles(light, decision.kept, tiles.to(light.dtype))

    def _lateral_rows(self, level: int, x: Tensor, coarse: Tensor, rows_R: Tensor) -> Tensor:
        """Return chosen rows of a level's lateral map and one of zeros, (R + 1, C)."""
        hw = tuple(x.shape[2:])
        with region('gather'):
            near = self._in_memory(x).permute(0, 2, 3, 1).flatten(0, 2).index_select(0, rows_R)
        with region('slow path'):
            # As one image of R x 1 positions: R images of one position are several times slower.
            near = near.view(1, -1, 1, near.shape[1]).permute(0, 3, 1, 2)
            near = tile_rows(conv_module(self.lateral_convs[level], near))
        with region('gather'):
            sources = _nearest_rows(len(x), hw, tuple(coarse.shape[2:]), x.device)
            sources = F.pad(sources.index_select(0, rows_R), (0, 1))
            rows = coarse.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, sources)
            # In place: another table of this size costs page faults.
            rows[:-1] += near
            rows[-1].zero_()
            return rows

    def _with_extra(
        self, outs: list[Tensor], inputs: Sequence[Tensor], laterals: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Add the levels beyond the backbone's, as ``FPN`` does."""
        convs = self.fpn_convs[len(outs) :]
        if not self.add_extra_convs:
            while len(outs) < self.num_outs:
                outs.append(F.max_pool2d(outs[-1], 1, stride=2))
            return tuple(outs)
        sources = dict(
            on_input=inputs[self.backbone_end_level - 1],
            on_lateral=laterals[-1],
            on_output=outs[-1],
        )
        x = sources[self.add_extra_convs]
        for i, conv in enumerate(convs):
            relu = i > 0 and self.relu_before_extra_convs
            x = conv(F.relu(x) if relu else x)
            outs.append(x.contiguous())
        return tuple(outs)


def _check_sizes(first: tuple[int, int], second: tuple[int, int], cell_size: int) -> None:
    if cell_grid(second, cell_size // 2) != cell_grid(first, cell_size):
        raise ValueError(
            'the second map of a sparse FPN must have half the height and width of the first, '
            f'got {second} for {first}'
        )


@cached
def _nearest_rows(
    batch: int, hw: tuple[int, int], small: tuple[int, int], device: torch.device
) -> Tensor:
    """Row of a small map that each row of its enlargement copies, (P,)."""
    index = torch.arange(batch * small[0] * small[1], dtype=torch.float64, device=device)
    enlarged = F.interpolate(index.view(batch, 1, *small), hw)
    return enlarged.flatten().long()
