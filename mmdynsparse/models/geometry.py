"""Sizes that the multiply-adds of Swin and of vision transformers depend on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..ops import BlockShape, cell_grid, ffn_macs, mixer_macs


@dataclass(frozen=True)
class Geometry:
    """Sizes of a backbone, stage by stage.

    Args:
        in_channels: Channels of the image.
        channels: Channels of each stage.
        heads: Attention heads of each stage.
        widths: Hidden units of the FFNs of each stage in the dense model.
        depths: Blocks of each stage.
        strides: Side of a patch, in px, and stride of each merging.
        window: Side of an attention window, in tokens; None for attention over all tokens.
        class_tokens: Tokens beside those of the map.
        run: Blocks of each stage that an output depends on.
    """

    in_channels: int
    channels: tuple[int, ...]
    heads: tuple[int, ...]
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    strides: tuple[int, ...]
    window: int | None
    class_tokens: int
    run: tuple[int, ...]

    def maps(self, hw: tuple[int, int]) -> list[tuple[int, int]]:
        """Return height and width of the map of each stage, for images of a size in px."""
        maps = []
        for stride in self.strides:
            hw = tuple(-(-side // stride) for side in hw)
            maps.append(hw)
        return maps

    def shapes(self, hw: tuple[int, int]) -> list[BlockShape]:
        """Return what the cost of a block depends on, for each stage and an image size in px."""
        shapes = []
        for h, w in self.maps(hw):
            tokens = h * w + self.class_tokens
            pairs = tokens**2
            if self.window is not None:
                pairs = math.prod(cell_grid((h, w), self.window)) * self.window**4
            i = len(shapes)
            shapes.append(BlockShape(h * w, tokens, pairs, self.channels[i], self.heads[i]))
        return shapes

    def rest_macs(self, hw: tuple[int, int]) -> int:
        """Return the multiply-adds of patch embedding and merging."""
        locations = [h * w for h, w in self.maps(hw)]
        rest = locations[0] * self.strides[0] ** 2 * self.in_channels * self.channels[0]
        for i, (c, out) in enumerate(pairwise(self.channels)):
            rest += locations[i + 1] * 4 * c * out if self.run[i + 1] else 0
        return rest

    def macs(
        self,
        hw: tuple[int, int],
        mixers: Sequence[Sequence[str]] | None = None,
        hidden: Sequence[Sequence[int]] | None = None,
    ) -> int:
        """Return the multiply-adds for one image: matrix products, convolutions and attention.

        Args:
            hw: Size of the image, in px.
            mixers: As of ``Pruning``. Defaults to None, the dense model.
            hidden: As of ``Pruning``. Defaults to None, the dense model.
        """
        total = self.rest_macs(hw)
        for i, (shape, run) in enumerate(zip(self.shapes(hw), self.run, strict=True)):
            costs: Mapping[str, int] = mixer_macs(shape)
            kinds = ['msa'] * run if mixers is None else mixers[i][:run]
            units = [self.widths[i]] * run if hidden is None else hidden[i][:run]
            total += sum(costs[kind] for kind in kinds) + ffn_macs(shape) * sum(units)
        return total


def swin_geometry(
    in_channels: int,
    embed_dims: int,
    window_size: int,
    mlp_ratio: float,
    depths: Sequence[int],
    num_heads: Sequence[int],
    strides: Sequence[int],
    out_indices: Sequence[int],
) -> Geometry:
    """Return the sizes of a Swin; arguments as of ``SparseSwinTransformer``."""
    channels = tuple(embed_dims * 2**i for i in range(len(depths)))
    widths = tuple(int(mlp_ratio * c) for c in channels)
    outputs = [out_indices] if isinstance(out_indices, int) else out_indices
    run = tuple(depth if i <= max(outputs) else 0 for i, depth in enumerate(depths))
    sizes = (channels, tuple(num_heads), widths, tuple(depths), tuple(strides))
    return Geometry(in_channels, *sizes, window_size, 0, run)


def vit_geometry(
    in_channels: int,
    embed_dims: int,
    patch_size: int,
    mlp_ratio: int,
    num_layers: int,
    num_heads: int,
    out_indices: int | Sequence[int],
    with_cls_token: bool,
) -> Geometry:
    """Return the sizes of a vision transformer; arguments as of ``SparseVisionTransformer``."""
    outputs = [out_indices] if isinstance(out_indices, int) else out_indices
    run = max(i % num_layers for i in outputs) + 1
    sizes = (embed_dims, num_heads, mlp_ratio * embed_dims, num_layers, patch_size)
    stage = ((size,) for size in sizes)
    return Geometry(in_channels, *stage, None, int(with_cls_token), (run,))
