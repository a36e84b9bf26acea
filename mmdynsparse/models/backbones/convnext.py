"""Sparse ConvNeXt.

Sources: Liu et al., *A ConvNet for the 2020s* (arXiv 2201.03545); Rao et al., *Dynamic Spatial
Sparsification* (T-PAMI 2023, arXiv 2207.01580). Arguments and state-dict names are those of
``ConvNeXt`` in mmpretrain, which the ConvNeXt configs of mmseg and mmdet use; mmpretrain itself is
not needed. What is added are predictors (``predictors.J``) and fast paths
(``stages.I.K.fast_path``).
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from mmcv.cnn import build_activation_layer
from mmcv.cnn.bricks.drop import DropPath
from mmengine.model import ModuleList
from mmengine.model.weight_init import constant_init, trunc_normal_init
from torch import Tensor, nn

from ...layers import LayerNorm2d, Linear, linear_act, mlp_weights
from ...ops import Plan, two_paths
from ...ops.kernels import MlpWeights
from ...registry import MODELS
from ..decider import build_part
from .sparse_backbone import Block, StagedBackbone, checkpoint_cfg, output_indices

ARCHS = {
    'atto': ((2, 2, 6, 2), (40, 80, 160, 320)),
    'femto': ((2, 2, 6, 2), (48, 96, 192, 384)),
    'pico': ((2, 2, 6, 2), (64, 128, 256, 512)),
    'nano': ((2, 2, 8, 2), (80, 160, 320, 640)),
    'tiny': ((3, 3, 9, 3), (96, 192, 384, 768)),
    'small': ((3, 3, 27, 3), (96, 192, 384, 768)),
    'base': ((3, 3, 27, 3), (128, 256, 512, 1024)),
    'large': ((3, 3, 27, 3), (192, 384, 768, 1536)),
    'xlarge': ((3, 3, 27, 3), (256, 512, 1024, 2048)),
    'huge': ((3, 3, 27, 3), (352, 704, 1408, 2816)),
}


class ConvNeXtBlock(Block):
    """Depthwise convolution everywhere, then MLP (slow) or fast path for each location.

    ``fast_path`` is a config, or None for a block that is never sparse or whose dropped locations
    stay as they are. The other arguments are as of the backbone.
    """

    def __init__(
        self,
        channels: int,
        act_cfg: dict,
        eps: float,
        drop_path_rate: float,
        layer_scale_init_value: float,
        with_cp: bool,
        fast_path: dict | None,
    ) -> None:
        super().__init__(with_cp)
        self.depthwise_conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = LayerNorm2d(channels, eps=eps)
        self.pointwise_conv1 = Linear(channels, 4 * channels)
        self.act = build_activation_layer(act_cfg)
        self.pointwise_conv2 = Linear(4 * channels, channels)
        self.gamma = None
        if layer_scale_init_value > 0:
            self.gamma = nn.Parameter(torch.full((channels,), float(layer_scale_init_value)))
        self.fast_path = build_part(fast_path, channels) if fast_path else None
        self.drop_path = DropPath(drop_path_rate)

    def _forward(self, x: Tensor, plan: Plan) -> Tensor:
        """Return the block's output for maps (B, C, H, W)."""
        mixed_BHWC = self.depthwise_conv(x).permute(0, 2, 3, 1)
        tokens_BNC = x.permute(0, 2, 3, 1).flatten(1, 2)
        paths = (self._slow_path, self.fast_path)
        out_BNC = two_paths(
            mixed_BHWC.flatten(1, 2), tokens_BNC, *paths, plan, self.drop_path, self._slow_weights
        )
        return out_BNC.view(mixed_BHWC.shape).permute(0, 3, 1, 2)

    def _slow_path(self, x: Tensor) -> Tensor:
        x = self.norm.over_last(x)
        x = self.pointwise_conv2(linear_act(x, self.pointwise_conv1, self.act))
        return x if self.gamma is None else x * self.gamma

    def _slow_weights(self) -> MlpWeights:
        fcs = (self.pointwise_conv1, self.act, self.pointwise_conv2)
        return mlp_weights(self.norm, *fcs, self.gamma)


@MODELS.register_module()
class SparseConvNeXt(StagedBackbone):
    """ConvNeXt that sends a part of its locations through the MLPs.

    Maps are kept channels last in memory, so that a location's channels are contiguous; those that
    are returned are not.

    Args:
        arch: A name ('tiny', 'small', 'base', 'large', ...) or dict(depths=..., channels=...).
            Defaults to 'tiny'.
        in_channels: Channels of the image. Defaults to 3.
        stem_patch_size: Side of a patch, in px. Defaults to 4.
        norm_cfg: Only 'LN2d'. Defaults to dict(type='LN2d', eps=1e-6).
        act_cfg: Activation. Defaults to dict(type='GELU').
        linear_pw_conv: Only True: pointwise convolutions are linear layers. Defaults to True.
        use_grn: Only False: the norm of ConvNeXt V2 needs all locations. Defaults to False.
        drop_path_rate: Stochastic depth of the last block, linear in depth. Defaults to 0.
        layer_scale_init_value: Initial LayerScale; 0 leaves it out. Defaults to 1e-6.
        out_indices: Stage or stages whose output is returned; negative ones count from the end.
            Defaults to -1.
        frozen_stages: Number of stages to freeze, with the layers before them. Defaults to 0.
        gap_before_final_norm: Whether outputs are averaged over the map before their norm, as for
            classification. Defaults to True.
        with_cp: Whether blocks recompute their activations in the backward pass. Defaults to
            False.
        init_cfg: None or dict(type='Pretrained', checkpoint=...). Defaults to None.
        sparsity: Where and how much the model is sparse, see
            :class:`~mmdynsparse.models.sparsity.Sparsity`; None is the dense model. Defaults to
            None.

    Raises:
        ValueError: If an argument is outside its range.
    """

    original = 'mmpretrain.ConvNeXt'
    source = 'mmpretrain'

    def __init__(
        self,
        arch: str | dict = 'tiny',
        in_channels: int = 3,
        stem_patch_size: int = 4,
        norm_cfg: dict | None = None,
        act_cfg: dict | None = None,
        linear_pw_conv: bool = True,
        use_grn: bool = False,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        out_indices: int | Sequence[int] = -1,
        frozen_stages: int = 0,
        gap_before_final_norm: bool = True,
        with_cp: bool = False,
        init_cfg: dict | None = None,
        sparsity: Mapping | None = None,
    ) -> None:
        depths, channels = _arch(arch)
        super().__init__(
            sparsity,
            depths,
            output_indices(out_indices, -len(depths), len(depths)),
            frozen_stages,
            checkpoint_cfg(init_cfg),
            predictor=dict(type='mmdynsparse.LocalGlobalPredictor', eps=1e-6),
            fast_path=dict(type='mmdynsparse.LinearFastPath', eps=1e-6, layer_scale=1e-6),
        )
        norm_cfg = norm_cfg or dict(type='LN2d')
        eps = norm_cfg.get('eps', 1e-6)
        _check_fixed("norm_cfg['type']", norm_cfg.get('type'), 'LN2d')
        _check_fixed('linear_pw_conv', linear_pw_conv, True)
        _check_fixed('use_grn', use_grn, False)
        self.gap_before_final_norm = gap_before_final_norm

        stem = nn.Conv2d(in_channels, channels[0], stem_patch_size, stride=stem_patch_size)
        self.downsample_layers = ModuleList([nn.Sequential(stem, LayerNorm2d(channels[0], eps))])
        for c_in, c_out in pairwise(channels):
            merge = nn.Sequential(LayerNorm2d(c_in, eps), nn.Conv2d(c_in, c_out, 2, stride=2))
            self.downsample_layers.append(merge)

        rates = iter(torch.linspace(0, drop_path_rate, sum(depths)).tolist())
        args = dict(act_cfg=act_cfg or dict(type='GELU'), eps=eps, with_cp=with_cp)
        args.update(layer_scale_init_value=layer_scale_init_value)
        self.stages = ModuleList()
        self.predictors = ModuleList()
        for i, (depth, c) in enumerate(zip(depths, channels, strict=True)):
            blocks = [
                ConvNeXtBlock(
                    c, drop_path_rate=next(rates), fast_path=self.fast_path_cfg(i, j), **args
                )
                for j in range(depth)
            ]
            self.stages.append(ModuleList(blocks))
            self.predictors.extend(self.build_predictors(i, c))
            if i in self.out_indices:
                self.add_module(f'norm{i}', LayerNorm2d(c, eps))
        self._freeze()

    def _stem(self, x: Tensor) -> Tensor:
        return self._downsample(x.contiguous(memory_format=torch.channels_last), 0)

    def _downsample(self, x: Tensor, stage: int) -> Tensor:
        return self.downsample_layers[stage](x)

    def _output(self, x: Tensor, stage: int) -> Tensor:
        """Return a map, or with ``gap_before_final_norm`` vectors (B, C)."""
        norm = getattr(self, f'norm{stage}')
        if self.gap_before_final_norm:
            return norm(x.mean((2, 3), keepdim=True)).flatten(1)
        return norm(x).contiguous()

    def _stage_parts(self, stage: int) -> Sequence[nn.Module]:
        return (self.downsample_layers[stage], *super()._stage_parts(stage))

    def _init_parameters(self) -> None:
        for m in self.modules():
            if isinstance(m, nn.Conv2d | nn.Linear):
                trunc_normal_init(m, std=0.02, bias=0.0)
            elif isinstance(m, nn.LayerNorm):
                constant_init(m, val=1.0, bias=0.0)


def _arch(arch: str | dict) -> tuple[Sequence[int], Sequence[int]]:
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise ValueError(f'arch must be one of {tuple(ARCHS)} or a dict, got {arch!r}')
        return ARCHS[arch]
    if not {'depths', 'channels'} <= set(arch) or len(arch['depths']) != len(arch['channels']):
        raise ValueError(f'arch must have depths and channels of the same length, got {arch}')
    return tuple(arch['depths']), tuple(arch['channels'])


def _check_fixed(name: str, value: object, allowed: object) -> None:
    if value != allowed:
        raise ValueError(f'{name} must be {allowed!r}, got {value!r}')
