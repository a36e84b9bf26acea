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
from typing import ClassVar

import torch
from mmcv.cnn import build_conv_layer, build_norm_layer
from mmengine.model.weight_init import constant_init, kaiming_init
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...layers import conv_norm, is_plain
from ...ops import (
    Decision,
    cell_mask,
    cell_rows,
    cell_table,
    gathering_pays,
    region,
    spread_decision,
    table_map,
    with_positions,
)
from ...registry import MODELS
from ...utils.checkpoint import load_pretrained
from .resnet_blocks import BasicBlock, Bottleneck, Cells, ResidualBlock
from .sparse_backbone import (
    SparseBackbone,
    check_stages,
    checkpoint_cfg,
    freeze,
    may_be_new,
)

# Share of kept cells above which computing everything and masking is as fast (benchmarks/).
BREAK_EVEN = 0.8

ARCHS = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


@MODELS.register_module()
class SparseResNet(SparseBackbone):
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
    default_parts: ClassVar = dict(
        predictor=dict(type='mmdynsparse.CellPredictor'), fast_path=None, cell_size=(8, 8, 4, 4)
    )

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
        if sparsity is not None:
            last = min(max(out_indices), num_stages - 1)
            places = {i: (1,) for i in range(1, last + 1)} or {0: (1,)}
            sparsity = dict(locations=places) | sparsity
        super().__init__(sparsity, depths, checkpoint_cfg(init_cfg, pretrained))
        check_stages(out_indices, frozen_stages, depths, self.sparsity)
        self.num_stages = num_stages
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.zero_init_residual = zero_init_residual

        norm_cfg = norm_cfg or dict(type='BN', requires_grad=True)
        cfgs = dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg)
        channels = stem_channels or base_channels
        self._build_stem(in_channels, channels, deep_stem, **cfgs)
        dcn = dcn and dict(dcn)  # blocks change it
        self.predictors = nn.ModuleList()
        self._obstacles: list[str | None] = []
        for i, count in enumerate(depths):
            rates = _dilations(count, dilations[i], contract_dilation)
            if multi_grid is not None and i == num_stages - 1:
                rates = multi_grid
            layer = self._build_stage(
                i,
                block,
                channels,
                base_channels * 2**i,
                strides[i],
                rates,
                style=style,
                avg_down=avg_down,
                with_cp=with_cp,
                dcn=dcn if dcn and stage_with_dcn[i] else None,
                plugins=[p for p in plugins or () if 'stages' not in p or p['stages'][i]],
                **cfgs,
            )
            self.add_module(f'layer{i + 1}', layer)
            channels = base_channels * 2**i * block.expansion
            self.predictors.extend(self.build_predictors(i, channels))
        self._check_sparse(self.keep_ratios)
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
        first_sparse = min(self.stage_locations(i), default=len(dilations))
        blocks = []
        for j, dilation in enumerate(dilations):
            fast_path = self.sparsity.fast_path if j >= first_sparse else None
            place = (in_channels, planes, stride, dilation)
            blocks.append(block(*place, fast_path=fast_path, **kwargs))
            in_channels, stride = planes * block.expansion, 1
        obstacles = (b.obstacle() for b in blocks[first_sparse:])
        self._obstacles.append(next(filter(None, obstacles), None))
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the maps (B, C_i, H_i, W_i) of ``out_indices`` for images (B, C, H, W).

        The tuple carries the decisions made on the way, over cells, and ``decisions`` holds them
        afterwards.
        """
        self.start_decisions()
        x = self._stem(x.contiguous(memory_format=torch.channels_last))
        decision = None
        outs = []
        for i in range(max(self.out_indices) + 1):
            x, decision = self._stage(x, i, decision)
            if i in self.out_indices:
                outs.append(x)
        # Operators such as RoIAlign read any map as if it were contiguous. One after the other, so
        # that at no time there are two copies of all.
        for i in range(len(outs)):
            outs[i] = outs[i].contiguous()
        return self.with_decisions(outs)

    def _stem(self, x: Tensor) -> Tensor:
        if self.deep_stem and not is_plain(self.stem, nn.Sequential):
            return self.maxpool(self.stem(x))
        for conv, norm in self.stem_layers:
            x = self.relu(conv_norm(x, conv, norm))
        return self.maxpool(x)

    def _stage(self, x: Tensor, i: int, last: Decision | None) -> tuple[Tensor, Decision | None]:
        """Run a stage after the last decision; return its output and the last decision then."""
        predictors = iter(self.stage_predictors(i))
        blocks, locations = list(self.stages[i]), self.stage_locations(i)
        for block in blocks[: min(locations, default=len(blocks))]:
            x = block(x)
        for start, end in pairwise((*locations, len(blocks))):
            hw, size = tuple(x.shape[2:]), self.cell_size(i)
            decision = self.decide_cells(x, i, next(predictors, None), last)
            if self.sparsity.follow:
                last = spread_decision(decision, hw, size)
            execution = self.execution_in(self.stages[i].training)
            x = _sparse_blocks(x, blocks[start:end], decision, size, execution)
        return x, last

    def train(self, mode: bool = True) -> 'SparseResNet':
        """Set the training mode; frozen stages stay in eval mode, without gradients."""
        super().train(mode)
        self._freeze()
        if mode and self.norm_eval:
            for m in self.modules():
                if isinstance(m, _BatchNorm):
                    m.eval()
        return self

    def _freeze(self) -> None:
        if self.frozen_stages >= 0:
            for part in chain(*self.stem_layers):
                freeze(part)
        for i, stage in enumerate(self.stages):
            for part in (stage, *self.stage_predictors(i)):
                if i < self.frozen_stages:
                    freeze(part)
                elif i > max(self.out_indices):
                    # No output depends on it, which distributed training refuses.
                    part.requires_grad_(False)

    def init_weights(self) -> None:
        """Initialize as ResNet does, then load the checkpoint of ``init_cfg`` if there is one."""
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
        if self.init_cfg is not None:
            load_pretrained(self, self.init_cfg['checkpoint'], 'mmdet', may_be_new)

    def set_keep_ratio(self, keep_ratio: float | Sequence[float]) -> None:
        """Change the keep ratios of the built model, see :class:`SparseBackbone`.

        Raises:
            ValueError: Also if a stage that cannot be sparse is to drop locations.
        """
        if self.sparsity is not None and hasattr(self, '_obstacles'):
            self._check_sparse(self.sparsity.resolve(keep_ratio))
        super().set_keep_ratio(keep_ratio)

    def _check_sparse(self, keep_ratios: Sequence[float]) -> None:
        ratios = iter(keep_ratios)
        for i, obstacle in enumerate(self._obstacles):
            locations = self.stage_locations(i)
            if any(self.stages[i][j].downsample is not None for j in locations):
                raise ValueError(
                    f'sparsity.locations[{i}] takes blocks that keep the size of their map, '
                    f'1 to {len(self.stages[i]) - 1}, got {locations}'
                )
            ratio = min((next(ratios) for _ in locations), default=1.0)
            if ratio < 1 and obstacle is not None:
                raise ValueError(
                    f'stage {i} must have plain convolutions (no conv_cfg, dcn or plugins) and '
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


def _sparse_blocks(
    x: Tensor, blocks: Sequence[ResidualBlock], decision: Decision, size: int, execution: str
) -> Tensor:
    """Run the blocks that share a decision."""
    sparse = not decision.keeps_all
    if execution != 'masked' and sparse:
        if decision.kept is None:
            decision = with_positions(decision)
        # Cells are not what a hook on a block expects.
        plain = all(is_plain(block, BasicBlock, Bottleneck) for block in blocks)
        if plain and gathering_pays(decision, None, BREAK_EVEN):
            return in_cells(x, blocks, decision, size, fused=execution == 'triton')
    mask = None
    if sparse or execution == 'masked':
        mask = cell_mask(decision.mask, tuple(x.shape[2:]), size)
    for block in blocks:
        x = block(x, mask)
    return x


def in_cells(
    x: Tensor, blocks: Sequence[ResidualBlock], decision: Decision, size: int, fused: bool
) -> Tensor:
    """Run blocks in the kept cells of a map, on a copy that they update in place."""
    batch, hw = len(x), tuple(x.shape[2:])
    with region('gather'):
        table = cell_table(x)
        dropped = cell_rows(decision.dropped, batch, hw, size, 0).inner
    kept = {}
    for block in blocks:
        if block.halo not in kept:
            with region('gather'):
                kept[block.halo] = cell_rows(decision.kept, batch, hw, size, block.halo)
        cells = Cells(decision.kept, kept[block.halo], dropped, size, batch, hw, fused)
        block.update_cells(table, cells)
    return table_map(table, batch, hw)


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
