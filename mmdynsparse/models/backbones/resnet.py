"""Sparse ResNet.

Sources: He et al., *Deep Residual Learning* (arXiv 1512.03385) and *Bag of Tricks* (arXiv
1812.01187) for V1c and V1d. The sparse form is our own, after Rao et al., *Dynamic Spatial
Sparsification* (T-PAMI 2023, arXiv 2207.01580): decisions are made for square cells, because a
3 x 3 convolution reads its neighbours. Arguments and state-dict names are those of ``ResNet``,
``ResNetV1c`` and ``ResNetV1d`` in mmsegmentation 1.x and mmdetection 3.x; what is added are
predictors (``predictors.J``) and, if asked for, fast paths (``layerI.K.fast_path``).
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from itertools import chain, pairwise

import torch
from mmcv.cnn import build_conv_layer, build_norm_layer
from mmengine.model.weight_init import constant_init, kaiming_init
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...layers import conv_norm, is_plain
from ...ops import Decision, Plan, cell_rows, cell_table, location_mask, region, table_map
from ...registry import MODELS
from .resnet_blocks import BasicBlock, Bottleneck, Cells, ResidualBlock
from .sparse_backbone import StagedBackbone, checkpoint_cfg

ARCHS = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


@MODELS.register_module()
class SparseResNet(StagedBackbone):
    """ResNet that evaluates residual branches in a part of the cells of its maps.

    A decision is made for cells of g x g positions and holds for the blocks up to the next
    predictor. A block without a projection of its identity can be sparse, that is, every block but
    the first of a stage. Kept cells get the block's residual; the others stay as they are, or get
    the fast path's. Maps are kept channels last in memory on the way.

    Args:
        depth: 18, 34, 50, 101 or 152.
        in_channels: Channels of the image. Defaults to 3.
        stem_channels: Channels of the stem. Defaults to None, ``base_channels``.
        base_channels: Planes of the first stage. Defaults to 64.
        num_stages: Stages, 1 to 4. Defaults to 4.
        strides: Stride of each stage. Defaults to (1, 2, 2, 2).
        dilations: Dilation of each stage. Defaults to (1, 1, 1, 1).
        out_indices: Stages whose output is returned. Defaults to (0, 1, 2, 3).
        style: 'pytorch': the 3 x 3 convolution of a bottleneck has its stride; 'caffe': the first
            1 x 1 convolution. Defaults to 'pytorch'.
        deep_stem: Three 3 x 3 convolutions in place of the 7 x 7. Defaults to False.
        avg_down: Average pooling before the projection of the identity. Defaults to False.
        frozen_stages: Stages to freeze: -1 none, 0 the stem, i also the first i stages. Defaults
            to -1.
        conv_cfg: Convolutions; a sparse stage takes plain ones. Defaults to None, plain ones.
        norm_cfg: Normalization; a sparse stage takes batch norms. Defaults to dict(type='BN',
            requires_grad=True).
        norm_eval: Whether batch norms keep their running statistics in training, mmdet's default
            and stated by its configs. Defaults to False, as in mmseg.
        dcn: Deformable convolution that replaces the 3 x 3 ones of bottlenecks; not in a sparse
            stage. Defaults to None.
        stage_with_dcn: Which stages have ``dcn``. Defaults to no stage.
        plugins: What is added to bottlenecks, as in mmdet; not in a sparse stage. Several at one
            position run one after the other. Defaults to None.
        multi_grid: Dilation of each block of the last stage. Defaults to None.
        contract_dilation: Whether the first block of a dilated stage has half its dilation.
            Defaults to False.
        with_cp: Whether blocks recompute their activations in the backward pass. Defaults to
            False.
        zero_init_residual: Whether the last norm of each block starts at zero. Defaults to True.
        pretrained: Deprecated, use ``init_cfg``. Defaults to None.
        init_cfg: None or dict(type='Pretrained', checkpoint=...). Defaults to None.
        sparsity: Where and how much the model is sparse, see
            :class:`~mmdynsparse.models.sparsity.Sparsity`; by default one predictor before block 1
            of each stage but the first, cells of (8, 8, 4, 4) positions, and no fast path. None is
            the dense model. Defaults to None. A stage of keep ratio 1.0 is dense as well.

    Raises:
        ValueError: If an argument is outside its range, or a sparse stage cannot be sparse.
    """

    original = 'ResNet'
    source = 'mmdet'
    gathers_cells = True
    # Computing everything and masking is as fast above (benchmarks/resnet_cells.py).
    break_even = 0.8

    def __init__(
        self,
        depth: int,
        in_channels: int = 3,
        stem_channels: int | None = None,
        base_channels: int = 64,
        num_stages: int = 4,
        strides: Sequence[int] = (1, 2, 2, 2),
        dilations: Sequence[int] = (1, 1, 1, 1),
        out_indices: Sequence[int] = (0, 1, 2, 3),
        style: str = 'pytorch',
        deep_stem: bool = False,
        avg_down: bool = False,
        frozen_stages: int = -1,
        conv_cfg: dict | None = None,
        norm_cfg: dict | None = None,
        norm_eval: bool = False,
        dcn: dict | None = None,
        stage_with_dcn: Sequence[bool] = (False, False, False, False),
        plugins: list | None = None,
        multi_grid: Sequence[int] | None = None,
        contract_dilation: bool = False,
        with_cp: bool = False,
        zero_init_residual: bool = True,
        pretrained: str | None = None,
        init_cfg: dict | None = None,
        sparsity: Mapping | None = None,
    ) -> None:
        by_stage = dict(strides=strides, dilations=dilations)
        if dcn is not None:
            import_module('mmcv.ops')  # registers deformable convolutions
            by_stage['stage_with_dcn'] = stage_with_dcn
        _check_shape(depth, style, num_stages, by_stage, multi_grid)
        block, depths = ARCHS[depth][0], ARCHS[depth][1][:num_stages]
        cfg, defaults = checkpoint_cfg(init_cfg, pretrained), _sparsity(out_indices, num_stages)
        super().__init__(sparsity, depths, out_indices, frozen_stages, cfg, **defaults)
        self.num_stages = num_stages
        self.norm_eval = norm_eval
        self.zero_init_residual = zero_init_residual

        cfgs = dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg or dict(type='BN', requires_grad=True))
        channels = stem_channels or base_channels
        self._build_stem(in_channels, channels, deep_stem, **cfgs)
        cfgs |= dict(style=style, avg_down=avg_down, with_cp=with_cp)
        dcn = dcn and dict(dcn)  # blocks change it
        self.predictors = nn.ModuleList()
        self._obstacles: list[str | None] = []
        for i, count in enumerate(depths):
            rates = _dilations(count, dilations[i], contract_dilation)
            if multi_grid is not None and i == num_stages - 1:
                rates = multi_grid
            place = (i, block, channels, base_channels * 2**i, strides[i], rates)
            stage_dcn = dcn if dcn and stage_with_dcn[i] else None
            added = [p for p in plugins or () if 'stages' not in p or p['stages'][i]]
            layer = self._build_stage(*place, dcn=stage_dcn, plugins=added, **cfgs)
            self.add_module(f'layer{i + 1}', layer)
            channels = base_channels * 2**i * block.expansion
            self.predictors.extend(self.build_predictors(i, channels))
        self._check_locations()
        self._freeze()

    @property
    def stages(self) -> list[nn.Sequential]:
        """The blocks of each stage."""
        return [getattr(self, f'layer{i + 1}') for i in range(self.num_stages)]

    @property
    def stem_layers(self) -> list[tuple[nn.Module, nn.Module]]:
        """The convolutions of the stem with their norms."""
        if self.deep_stem:
            return [(self.stem[i], self.stem[i + 1]) for i in (0, 3, 6)]
        return [(self.conv1, getattr(self, self.norm1_name))]

    def _build_stem(
        self, in_channels: int, channels: int, deep: bool, conv_cfg: dict | None, norm_cfg: dict
    ) -> None:
        self.deep_stem = deep
        if deep:
            widths = (in_channels, channels // 2, channels // 2, channels)
            self.stem = nn.Sequential()
            for i, pair in enumerate(pairwise(widths)):
                place = dict(stride=2 if i == 0 else 1, padding=1)
                conv = build_conv_layer(conv_cfg, *pair, 3, bias=False, **place)
                self.stem.extend((conv, build_norm_layer(norm_cfg, pair[1])[1], nn.ReLU(True)))
        else:
            place = dict(stride=2, padding=3)
            self.conv1 = build_conv_layer(conv_cfg, in_channels, channels, 7, bias=False, **place)
            self.norm1_name, norm = build_norm_layer(norm_cfg, channels, postfix=1)
            self.add_module(self.norm1_name, norm)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)

    def _build_stage(
        self,
        i: int,
        block: type[ResidualBlock],
        in_channels: int,
        planes: int,
        stride: int,
        dilations: Sequence[int],
        **kwargs,
    ) -> nn.Sequential:
        blocks = []
        for j, dilation in enumerate(dilations):
            place = (in_channels, planes, stride, dilation)
            blocks.append(block(*place, fast_path=self.fast_path_cfg(i, j), **kwargs))
            in_channels, stride = planes * block.expansion, 1
        first_sparse = min(self.stage_locations(i), default=len(blocks))
        obstacles = (b.obstacle() for b in blocks[first_sparse:])
        self._obstacles.append(next(filter(None, obstacles), None))
        return nn.Sequential(*blocks)

    def _stem(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        if self.deep_stem and not is_plain(self.stem, nn.Sequential):
            return self.maxpool(self.stem(x))
        for conv, norm in self.stem_layers:
            x = self.relu(conv_norm(x, conv, norm))
        return self.maxpool(x)

    def _run_blocks(self, x: Tensor, blocks: Sequence[ResidualBlock], plan: Plan) -> Tensor:
        if plan.gathers:
            if all(is_plain(block, BasicBlock, Bottleneck) for block in blocks):
                return in_cells(x, blocks, plan)
            # Cells are not what a hook on a block expects.
            plan = Plan('masked', plan.decision, location_mask(plan.decision))
        mask = None if plan.mask is None else plan.mask.view(x.shape[0], 1, *x.shape[2:])
        for block in blocks:
            x = block(x, mask)
        return x

    def _output(self, x: Tensor, stage: int) -> Tensor:
        return x

    def _finish(self, maps: list[Tensor], decisions: list[Decision]) -> tuple:
        # One after the other, so that at no time there are two copies of all.
        for i in range(len(maps)):
            maps[i] = maps[i].contiguous()
        return super()._finish(maps, decisions)

    def train(self, mode: bool = True) -> 'SparseResNet':
        """Set the training mode; frozen stages, and norms with ``norm_eval``, stay in eval mode."""
        super().train(mode)
        if mode and self.norm_eval:
            for m in self.modules():
                if isinstance(m, _BatchNorm):
                    m.eval()
        return self

    def _stem_parts(self) -> Sequence[nn.Module]:
        return (self.stem,) if self.deep_stem else self.stem_layers[0]

    def _init_parameters(self) -> None:
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                kaiming_init(m)
            elif isinstance(m, _BatchNorm | nn.GroupNorm):
                constant_init(m, 1)
        for block in chain(*self.stages):
            if self.zero_init_residual:
                constant_init(block.layers[-1][1], 0)
            # Deformable convolutions and plugins have their own start.
            for part in block.children():
                if hasattr(part, 'init_weights'):
                    part.init_weights()

    def _plan(self, decision: Decision, stage: int) -> Plan:
        self._check_sparse(stage, decision.ratio)
        return super()._plan(decision, stage)

    def _check_locations(self) -> None:
        for stage, blocks in enumerate(self.stages):
            locations = self.stage_locations(stage)
            if any(blocks[j].downsample is not None for j in locations):
                raise ValueError(
                    f'sparsity.locations[{stage}] takes blocks that keep the size of their map, '
                    f'1 to {len(blocks) - 1}, got {locations}'
                )
            for j in locations:
                self._check_sparse(stage, self.keep_ratios[self.sparsity.index(stage, j)])

    def _check_sparse(self, stage: int, ratio: float) -> None:
        obstacle = self._obstacles[stage]
        if ratio < 1 and obstacle is not None:
            raise ValueError(
                f'stage {stage} must have plain convolutions (no conv_cfg, dcn or plugins) and '
                f'batch norms with running statistics to be sparse, or keep ratio 1.0, got '
                f'{obstacle} and {ratio}'
            )


@MODELS.register_module()
class SparseResNetV1c(SparseResNet):
    """Sparse ResNet with a stem of three 3 x 3 convolutions; arguments of ``SparseResNet``."""

    original = 'ResNetV1c'

    def __init__(self, depth: int, **kwargs) -> None:
        super().__init__(depth, deep_stem=True, avg_down=False, **kwargs)


@MODELS.register_module()
class SparseResNetV1d(SparseResNet):
    """V1c with average pooling before the projections; arguments of ``SparseResNet``."""

    original = 'ResNetV1d'

    def __init__(self, depth: int, **kwargs) -> None:
        super().__init__(depth, deep_stem=True, avg_down=True, **kwargs)


def in_cells(x: Tensor, blocks: Sequence[ResidualBlock], plan: Plan) -> Tensor:
    """Run blocks in the kept cells of a map, on a copy that they update in place."""
    batch, hw, size = x.shape[0], tuple(x.shape[2:]), plan.decision.cell_size
    with region('gather'):
        table = cell_table(x)
        dropped = cell_rows(plan.dropped, batch, hw, size, 0).inner
    kept = {}
    for block in blocks:
        if block.halo not in kept:
            with region('gather'):
                kept[block.halo] = cell_rows(plan.kept, batch, hw, size, block.halo)
        fused = plan.form == 'triton'
        cells = Cells(plan.kept, kept[block.halo], dropped, size, batch, hw, fused)
        block.update_cells(table, cells)
    return table_map(table, batch, hw)


def _sparsity(out_indices: Sequence[int], num_stages: int) -> dict:
    """Return the defaults of ``sparsity``, with a predictor in each stage but the first."""
    last = min(max(out_indices, default=0), num_stages - 1)
    return dict(
        locations={i: (1,) for i in range(1, last + 1)} or {0: (1,)},
        predictor=dict(type='mmdynsparse.CellPredictor'),
        fast_path=None,
        cell_size=(8, 8, 4, 4),
    )


def _dilations(count: int, dilation: int, contract: bool) -> tuple[int, ...]:
    first = dilation // 2 if contract and dilation > 1 else dilation
    return (first,) + (dilation,) * (count - 1)


def _check_shape(
    depth: int,
    style: str,
    num_stages: int,
    by_stage: Mapping[str, Sequence],
    multi_grid: Sequence[int] | None,
) -> None:
    if depth not in ARCHS:
        raise ValueError(f'depth must be one of {tuple(ARCHS)}, got {depth}')
    if style not in ('pytorch', 'caffe'):
        raise ValueError(f"style must be 'pytorch' or 'caffe', got {style!r}")
    if not 1 <= num_stages <= 4:
        raise ValueError(f'num_stages must be in 1 to 4, got {num_stages}')
    for name, values in by_stage.items():
        if len(values) != num_stages:
            raise ValueError(f'{name} must have num_stages = {num_stages} values, got {values}')
    last_depth = ARCHS[depth][1][num_stages - 1]
    if multi_grid is not None and len(multi_grid) != last_depth:
        raise ValueError(
            f'multi_grid must have {last_depth} values, one for each block of the last stage, '
            f'got {multi_grid}'
        )
