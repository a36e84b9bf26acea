"""The neck that makes a pyramid of the last map of a plain vision transformer.

Source: Li et al., *Exploring Plain Vision Transformer Backbones for Object Detection* (ViTDet,
arXiv 2203.16527), as ``SimpleFeaturePyramid`` of detectron2. mmdetection has one in its projects
only.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from mmengine.model import BaseModule, ModuleList, Sequential
from torch import Tensor, nn

from ...layers import LayerNorm2d
from ...registry import MODELS


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """Maps of strides 4, 8, 16 and 32, each from the last map of the backbone, of stride 16.

    A map is enlarged by deconvolutions or reduced by max pooling, and then gets a 1 x 1 and a
    3 x 3 convolution with layer norms. Nothing flows from level to level. The maps are dense and
    carry no decisions of the backbone.

    Args:
        in_channels: Channels of the backbone's last map, a multiple of 4.
        out_channels: Channels of all maps. Defaults to 256.
        num_outs: Maps, at least 4; further ones are every second position of the one before.
            Defaults to 5.
        init_cfg: As in every OpenMMLab module. Defaults to None.

    Raises:
        ValueError: If ``in_channels`` or ``num_outs`` is outside its range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        num_outs: int = 5,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if not isinstance(in_channels, int) or in_channels < 4 or in_channels % 4:
            raise ValueError(f'in_channels must be a multiple of 4, got {in_channels!r}')
        if num_outs < 4:
            raise ValueError(f'num_outs must be at least 4, got {num_outs}')
        self.num_outs = num_outs
        c, half, quarter = in_channels, in_channels // 2, in_channels // 4
        stride_4 = (_double(c, half), LayerNorm2d(half), nn.GELU(), _double(half, quarter))
        self.levels = ModuleList(
            [
                Sequential(*stride_4, *_convs(quarter, out_channels)),
                Sequential(_double(c, half), *_convs(half, out_channels)),
                Sequential(*_convs(c, out_channels)),
                Sequential(nn.MaxPool2d(2), *_convs(c, out_channels)),
            ]
        )

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the maps (B, C, H_i, W_i) of all levels, contiguous in memory.

        RoIAlign of mmcv reads a map that is channels last in memory wrongly.
        """
        outs = [level(inputs[-1]).contiguous() for level in self.levels]
        while len(outs) < self.num_outs:
            outs.append(F.max_pool2d(outs[-1], 1, stride=2))
        return tuple(outs)


def _double(in_channels: int, out_channels: int) -> nn.Module:
    """Return a layer that doubles the sides of a map."""
    return nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)


def _convs(in_channels: int, out_channels: int) -> list[nn.Module]:
    """Return the layers that end each level."""
    return [
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        LayerNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        LayerNorm2d(out_channels),
    ]
