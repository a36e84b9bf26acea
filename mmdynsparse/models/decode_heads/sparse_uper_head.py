"""UPerHead whose convolutions run at the resolution and in the cells where they matter.

Source: Xiao et al., *Unified Perceptual Parsing* (arXiv 1807.10221), as ``UPerHead`` of
mmsegmentation 1.x, whose arguments and state-dict names it has. What is sparse is our own, after
Rao et al. (T-PAMI 2023, arXiv 2207.01580). Dimension letters: B images, C channels, H x W the
finest map (stride 4), h x w the next one (stride 8), K kept cells of g x g positions, R rows.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmseg.models.decode_heads import UPerHead
from torch import Tensor, nn

from ...layers import is_plain
from ...layers.cell_conv import KeptCells, channels_last, kept_cells
from ...layers.conv_module import check_conv_modules, conv_module, norm_act
from ...ops import (
    Decision,
    Plan,
    cell_grid,
    cell_mask,
    cell_table,
    conv2d,
    enlarge_cells,
    enlarge_rows,
    is_exporting,
    put_rows,
    region,
    sparse_table,
    table_map,
    tile_rows,
)
from ...registry import MODELS
from ..decider import Decider
from ..sparsity import CellSparsity


class Coarse(NamedTuple):
    """What the head computes everywhere at stride 8.

    Attributes:
        lateral: (B, C, h, w), the top-down path's sum of the second level.
        fine_in: (B, C, h, w), the first level's output where its cell is not kept.
        outs: Outputs of the levels from the second on.
        rest: (B, C, h, w), the fusion convolution's sum over those levels, or None if it is called
            as a whole.
        logits: (B, classes, h, w)
        features: (B, C, h, w), what they are classified from.
    """

    lateral: Tensor
    fine_in: Tensor
    outs: list[Tensor]
    rest: Tensor | None
    logits: Tensor
    features: Tensor


@MODELS.register_module()
class SparseUPerHead(UPerHead):
    """UPerHead with two levers.

    *Resolution.* The fusion convolution over the concatenated levels is a sum of convolutions,
    one for each level. Those of the enlarged levels are computed at their own resolution and
    their results are enlarged. It needs no weights and no training. ``resolution`` alone decides
    about it, whatever the keep ratio of the second lever.

    *Location.* The convolutions at stride 4 (those of the first level and its share of the
    fusion) run in kept cells. Elsewhere the head predicts at stride 8, from the first level at
    half its resolution, and the logits are enlarged. Which cells are kept is decided from that
    coarse prediction, which is there for the whole map: those with the highest entropy, without
    training, or those that a predictor chooses. Or the backbone's predictors have decided.

    Args:
        sparsity: None for the dense head, or a dict: ``resolution``, whether the first lever is
            used (True by default), and the arguments of
            :class:`~mmdynsparse.models.sparsity.CellSparsity`, which turn on the second one if
            ``keep_ratio`` is among them; without ``predictor`` the entropy decides, and with
            'backbone' the scores that come with the feature maps of a sparse backbone. Defaults
            to None.
        **kwargs: Arguments of mmseg's ``UPerHead``.

    Raises:
        ValueError: If ``sparsity`` is not valid, or with it a convolution is not a plain one, a
            norm is no batch norm or there is one level only.
    """

    original: ClassVar[str] = 'UPerHead'

    def __init__(self, sparsity: Mapping | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        if not isinstance(sparsity, Mapping | None):
            raise ValueError(f'sparsity must be None or a dict, got {sparsity!r}')
        options = dict(sparsity or {})
        self.resolution = options.pop('resolution', sparsity is not None)
        if not isinstance(self.resolution, bool):
            raise ValueError(f'sparsity.resolution must be True or False, got {self.resolution!r}')
        if sparsity is not None:
            check_conv_modules(self, 'conv_cfg and norm_cfg')
            if len(self.in_channels) < 2:
                raise ValueError(
                    'in_channels must be of at least 2 levels in a sparse UPerHead, '
                    f'got {self.in_channels}'
                )
        self.decider = None
        if options:
            cells = CellSparsity.from_cfg(options)
            self.cell_size = cells.cell_size
            self.decider = Decider(cells, self.channels)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return the logits (B, classes, H, W) of feature maps (B, C_i, H_i, W_i)."""
        if self.decider is None:
            return super().forward(inputs)
        maps = self._transform_inputs(inputs)
        hw = tuple(maps[0].shape[2:])
        decision = self.decider.decide_early(inputs, hw)
        if decision is None or not decision.keeps_all:
            maps = [self._in_memory(x) for x in maps]
            _check_sizes(maps)
            coarse = self._coarse(maps[0], self._laterals(maps))
        if decision is None:
            decision = self._decide(coarse, hw)
        self.decider([decision])
        if decision.keeps_all and not decision.mask.requires_grad:
            return self.cls_seg(self._forward_feature(inputs))
        plan = self.decider.plan(decision)
        if plan.gathers and self._reads_fusion:
            return self._in_cells(maps[0], coarse, plan)
        return self._masked(maps[0], coarse, decision)

    def _forward_feature(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return the features (B, C, H, W) of every location, without the second lever."""
        if not (self.resolution and self._reads_fusion):
            return super()._forward_feature(inputs)
        maps = [self._in_memory(x) for x in self._transform_inputs(inputs)]
        laterals = self._laterals(maps)
        first = conv_module(self.lateral_convs[0], maps[0])
        first = conv_module(self.fpn_convs[0], first + self._enlarge(laterals[0], first))
        rest = self._rest(self._outs(laterals))
        return self._finish(self._share(0, first) + self._enlarge(rest, first))

    def _in_memory(self, x: Tensor) -> Tensor:
        return x if self.training else channels_last(x)

    def _laterals(self, maps: list[Tensor]) -> list[Tensor]:
        """Top-down path from the last level to the second one, which comes first."""
        laterals = [self.psp_forward(maps)]
        for x, conv in zip(maps[-2:0:-1], self.lateral_convs[:0:-1], strict=True):
            x = conv_module(conv, x)
            laterals.insert(0, x + self._enlarge(laterals[0], x))
        return laterals

    def _outs(self, laterals: list[Tensor]) -> list[Tensor]:
        convs = self.fpn_convs[1:]
        pairs = zip(convs, laterals[:-1], strict=True)
        return [conv_module(conv, x) for conv, x in pairs] + laterals[-1:]

    def _rest(self, outs: list[Tensor]) -> Tensor:
        """Sum of the fusion convolution over all levels but the first, each at its resolution."""
        total = self._share(len(outs), outs[-1])
        for level in range(len(outs) - 1, 0, -1):
            share = self._share(level, outs[level - 1])
            total = share + self._enlarge(total, share)
        return total

    @property
    def _reads_fusion(self) -> bool:
        """Whether a level's share of the fusion can be computed; else it is called as a whole."""
        fusion = self.fpn_bottleneck
        return is_plain(fusion, ConvModule) and is_plain(fusion.conv, nn.Conv2d)

    def _fuse(self, first: Tensor, outs: list[Tensor], light: bool = False) -> Tensor:
        """Apply the fusion to the first level and the enlarged others."""
        outs = [self._enlarge(out, first) for out in outs]
        return conv_module(self.fpn_bottleneck, torch.cat([first, *outs], dim=1), light=light)

    def _share(self, level: int, x: Tensor, padding: int = 1) -> Tensor:
        """Apply the fusion convolution's weights for one level, without its bias."""
        weight = self.fpn_bottleneck.conv.weight.narrow(1, level * self.channels, self.channels)
        return conv2d(x, weight, padding=padding)

    def _finish(self, x: Tensor, light: bool = False) -> Tensor:
        """Apply what follows the fusion convolution's sum: bias, norm, activation."""
        fusion = self.fpn_bottleneck
        if fusion.conv.bias is not None:
            x = x + fusion.conv.bias.view(-1, 1, 1)
        return norm_act(fusion, x, light)

    def _enlarge(self, x: Tensor, like: Tensor) -> Tensor:
        if x.shape[2:] == like.shape[2:]:
            return x
        return F.interpolate(
            x, size=like.shape[2:], mode='bilinear', align_corners=self.align_corners
        )

    def _coarse(self, x: Tensor, laterals: list[Tensor]) -> Coarse:
        """Predict at stride 8: the light path, and the input of the decision."""
        hw = laterals[0].shape[2:]
        first = conv_module(self.lateral_convs[0], F.adaptive_avg_pool2d(x, hw), light=True)
        first = conv_module(self.fpn_convs[0], first + laterals[0], light=True)
        outs = self._outs(laterals)
        if self._reads_fusion:
            rest = self._rest(outs)
            features = self._finish(self._share(0, first) + rest, light=True)
        else:
            rest, features = None, self._fuse(first, outs, light=True)
        return Coarse(laterals[0], first, outs, rest, self.cls_seg(features), features)

    def _decide(self, coarse: Coarse, hw: tuple[int, int]) -> Decision:
        grid = cell_grid(hw, self.cell_size)
        if self.decider.predictor is None:
            log_probs = self._cells(_entropy(coarse.logits), grid).log()
            return self.decider.decide(log_probs, hw, self.cell_size)
        return self.decider.predict(self._cells(coarse.features, grid), hw, self.cell_size)

    def _cells(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return what is seen of each cell of a map at stride 8, (B, N, C)."""
        small = cell_grid(tuple(x.shape[2:]), self.cell_size // 2)
        cells = self.decider.cells(x, self.cell_size // 2)
        if small == grid:
            return cells
        # A map of odd height or width, halved and rounded down, may lack the last cells.
        cells = cells.transpose(1, 2).unflatten(2, small)
        edge = (0, grid[1] - small[1], 0, grid[0] - small[0])
        return F.pad(cells, edge, mode='replicate').flatten(2).transpose(1, 2)

    def _masked(self, x: Tensor, coarse: Coarse, decision: Decision) -> Tensor:
        """Compute both paths everywhere and combine them by the mask."""
        mask = cell_mask(decision.mask, tuple(x.shape[2:]), self.cell_size).to(x.dtype)
        first = conv_module(self.lateral_convs[0], x)
        first = conv_module(self.fpn_convs[0], first + self._enlarge(coarse.lateral, x))
        if not self.training:
            # In training the fusion's batch statistics shall be those of the fine path alone.
            first = first * mask + self._enlarge(coarse.fine_in, x) * (1 - mask)
        if self.resolution and self._reads_fusion:
            features = self._finish(self._share(0, first) + self._enlarge(coarse.rest, x))
        else:
            features = self._fuse(first, coarse.outs)
        return self.cls_seg(features) * mask + self._enlarge(coarse.logits, x) * (1 - mask)

    def _in_cells(self, x: Tensor, coarse: Coarse, plan: Plan) -> Tensor:
        """Compute the fine path in the kept cells alone."""
        logits = self._enlarge(coarse.logits, x)
        if plan.kept.shape[0] == 0:
            return logits
        with region('gather'):
            cells = kept_cells(plan, x)
            table = cell_table(logits)
        with region('slow path'):
            first = self._first_in_cells(x, coarse, cells)
            features = self._fuse_in_cells(first, coarse, cells, tuple(x.shape[2:]))
            kept = tile_rows(self.cls_seg(features))
        with region('scatter'):
            put_rows(table, cells.rows.inner, kept)
        return table_map(table, x.shape[0], tuple(x.shape[2:]))

    def _first_in_cells(self, x: Tensor, coarse: Coarse, cells: KeptCells) -> Tensor:
        """Return a table of the first level's outputs, filled where the tiles read it."""
        hw, size = tuple(x.shape[2:]), x.shape[0] * x.shape[2] * x.shape[3]
        enlarged = partial(self._rows, coarse.lateral, cells, hw)
        tiles = cells.lateral_tiles(x, self.lateral_convs[0], enlarged)
        kept = tile_rows(conv_module(self.fpn_convs[0], tiles, padding=0))
        near = cells.rows.near
        first = sparse_table(self._rows(coarse.fine_in, cells, hw, near), near, size)
        put_rows(first, cells.rows.inner, kept)
        return first

    def _fuse_in_cells(
        self, first: Tensor, coarse: Coarse, cells: KeptCells, hw: tuple[int, int]
    ) -> Tensor:
        """Return the fused features of the kept cells, (K, C, g, g)."""
        total, rows = self._share(0, cells.tiles_of_table(first), padding=0), cells.rows
        if self.resolution:
            rest = self._rows(coarse.rest, cells, hw, rows.inner, halo=0)
            rest = rest.view(total.shape[0], self.cell_size, self.cell_size, -1)
            return self._finish(total + rest.permute(0, 3, 1, 2))
        for level, out in enumerate(coarse.outs, 1):
            table = self._rows(out, cells, hw, rows.near)
            table = sparse_table(table, rows.near, first.shape[0] - 2)
            total += self._share(level, cells.tiles_of_table(table), padding=0)
        return self._finish(total)

    def _rows(
        self, x: Tensor, cells: KeptCells, hw: tuple[int, int], rows_R: Tensor, halo: int = 1
    ) -> Tensor:
        """Return rows of a map resized to ``hw``, those of the cells and their halo."""
        twice = not self.align_corners and hw == tuple(2 * side for side in x.shape[2:])
        with region('gather'):
            if is_exporting() and twice:
                return enlarge_cells(x, cells.index, cells.size, halo)
            return enlarge_rows(x, rows_R, hw, self.align_corners)


def _entropy(logits: Tensor) -> Tensor:
    """Share of the highest possible entropy, and the rest, (B, 2, h, w) of logits (B, K, h, w)."""
    logits = logits.detach().float()
    if logits.shape[1] == 1:
        logits = torch.cat((logits, torch.zeros_like(logits)), dim=1)
    log_probs = F.log_softmax(logits, dim=1)
    entropy = -(log_probs.exp() * log_probs).sum(1, keepdim=True) / math.log(logits.shape[1])
    return torch.cat((entropy, 1 - entropy), dim=1).clamp(min=1e-12)


def _check_sizes(maps: Sequence[Tensor]) -> None:
    for first, second in zip(maps[0].shape[2:], maps[1].shape[2:], strict=True):
        if second not in (first // 2, (first + 1) // 2):
            raise ValueError(
                'the second map must have half the height and width of the first where a head '
                f'computes cells, got {tuple(maps[1].shape[2:])} for {tuple(maps[0].shape[2:])}'
            )
