"""FPN whose two finest levels are computed in kept cells.

Source: Lin et al., *Feature Pyramid Networks* (arXiv 1612.03144), as ``FPN`` of mmdetection 3.x,
whose arguments and state-dict names it has. What is sparse is our own, after Rao et al. (T-PAMI
2023, arXiv 2207.01580). Dimension letters: B images, C channels, N cells of an image, K kept ones,
R rows (see ``ops.cells``).
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from mmdet.models.necks import FPN
from torch import Tensor

from ...layers.cell_conv import channels_last, check_half_size, kept_cells
from ...layers.conv_module import check_conv_modules, conv_module
from ...ops import Decision, Plan, cell_mask, put_tiles, region
from ...ops.caching import cached
from ...registry import MODELS
from ..decider import Decider
from ..features import with_decisions
from ..sparsity import CellSparsity

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
        sparsity: Arguments of :class:`~mmdynsparse.models.sparsity.CellSparsity`; by default the
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
        cells = CellSparsity.from_cfg(sparsity, predictor=predictor)
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
        decision = self.decider.decide_early(inputs, hw)
        if decision is not None and decision.keeps_all:
            return self._finish((x.contiguous() for x in super().forward(inputs)), decision)
        laterals = self._laterals(maps)
        check_half_size('FPN', hw, tuple(laterals[0].shape[2:]), self.cell_size)
        if decision is None:
            cells_BNC = self.decider.cells(laterals[0], self.cell_size // 2)
            decision = self.decider.predict(cells_BNC, hw, self.cell_size)
        plan = self.decider.plan(decision)
        outs = self._coarse_outs(laterals[1:])
        outs.insert(0, self._out(1, laterals[0], None, outs[0], plan))
        outs.insert(0, self._out(0, maps[0], laterals[0], outs[0], plan))
        return self._finish(self._with_extra(outs, inputs, laterals), decision)

    def _finish(self, maps: Iterable[Tensor], decision: Decision) -> tuple[Tensor, ...]:
        self.decider([decision])
        return with_decisions(maps, [decision])

    def _laterals(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Lateral maps of the second level (which comes first) and of the coarser ones."""
        laterals = [conv_module(self.lateral_convs[-1], self._in_memory(maps[-1]))]
        for x, conv in zip(maps[-2:0:-1], self.lateral_convs[-2:0:-1], strict=True):
            x = conv_module(conv, self._in_memory(x))
            laterals.insert(0, x + F.interpolate(laterals[0], x.shape[2:]))
        return laterals

    def _in_memory(self, x: Tensor) -> Tensor:
        return x if self.training else channels_last(x)

    def _coarse_outs(self, laterals: list[Tensor]) -> list[Tensor]:
        convs = self.fpn_convs[SPARSE_LEVELS : len(self.lateral_convs)]
        pairs = zip(convs, laterals, strict=True)
        return [conv_module(conv, x).contiguous() for conv, x in pairs]

    def _out(
        self, level: int, x: Tensor, coarse: Tensor | None, light: Tensor, plan: Plan
    ) -> Tensor:
        """Return the output of level 0 or 1.

        ``x`` is the level's lateral map. Where ``coarse``, the lateral map of the next level, is
        given, ``x`` is what it is computed from. ``light`` is the output of the next level.
        """
        if plan.gathers:
            return self._in_cells(level, x, coarse, light, plan)
        hw = tuple(x.shape[2:])
        if coarse is not None:
            x = conv_module(self.lateral_convs[level], x) + F.interpolate(coarse, hw)
        x = conv_module(self.fpn_convs[level], x)
        mask = cell_mask(plan.decision.mask, hw, self.cell_size >> level).to(x.dtype)
        return (x * mask + F.interpolate(light, hw) * (1 - mask)).contiguous()

    def _in_cells(
        self, level: int, x: Tensor, coarse: Tensor | None, light: Tensor, plan: Plan
    ) -> Tensor:
        hw = tuple(x.shape[2:])
        if plan.kept.shape[0] == 0:
            return F.interpolate(light, hw)
        cells = kept_cells(plan, x, level)
        if coarse is None:
            tiles = cells.tiles_of_map(x)
        else:
            tiles = cells.lateral_tiles(
                x, self.lateral_convs[level], partial(_enlarged_rows, coarse, hw)
            )
        with region('slow path'):
            tiles = conv_module(self.fpn_convs[level], tiles, padding=0)
        with region('scatter'):
            # Not enlarged before: the rows of above take as much memory, which is free by now.
            light = F.interpolate(light, hw)
            return put_tiles(light, plan.kept, tiles.to(light.dtype))

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


def _enlarged_rows(x_BCHW: Tensor, hw: tuple[int, int], rows_R: Tensor) -> Tensor:
    """Return chosen rows of a map, enlarged to ``hw`` by copying the nearest, (R, C)."""
    sources = _nearest_rows(x_BCHW.shape[0], hw, tuple(x_BCHW.shape[2:]), x_BCHW.device)
    return x_BCHW.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, sources[rows_R])


@cached
def _nearest_rows(
    batch: int, hw: tuple[int, int], small: tuple[int, int], device: torch.device
) -> Tensor:
    """Row of a small map that each row of its enlargement copies, (P,)."""
    index = torch.arange(batch * small[0] * small[1], dtype=torch.float64, device=device)
    enlarged = F.interpolate(index.view(batch, 1, *small), hw)
    return enlarged.flatten().long()
