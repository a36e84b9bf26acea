"""Patch embedding and patch merging with the parameters of OpenMMLab's Swin, and LV-ViT's stem."""

import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..ops import linear
from .conv_norm import conv_norm
from .linear import Linear
from .plain import is_plain


class PatchEmbed(BaseModule):
    """Cut an image into non-overlapping patches and project each to a token.

    Args:
        in_channels: Channels of the image.
        embed_dims: Channels C of a token.
        patch_size: Side of a patch, in px.
        norm_cfg: Normalization after the projection, or None.
        bias: Whether the projection has a bias. Defaults to True.
    """

    def __init__(
        self,
        in_channels: int,
        embed_dims: int,
        patch_size: int,
        norm_cfg: dict | None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.projection = nn.Conv2d(in_channels, embed_dims, patch_size, patch_size, bias=bias)
        self.norm = build_norm_layer(norm_cfg, embed_dims)[1] if norm_cfg else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Map images (B, in_channels, H, W) of any size to tokens (B, N, C) and the map's size.

        Images are padded with zeros at the right and the bottom to whole patches.
        """
        x = self.projection(_pad_to_multiple(x, self.patch_size))
        return self.norm(x.flatten(2).transpose(1, 2)), tuple(x.shape[2:])


class ConvPatchEmbed(PatchEmbed):
    """Patches of a map at half the image's size, which three convolutions make (LV-ViT).

    Args:
        in_channels: Channels of the image.
        embed_dims: Channels C of a token.
        patch_size: Side of a patch, in px of the image: an even number.
        norm_cfg: Normalization after the projection, or None.
        bias: Whether the projection has a bias. Defaults to True.

    Raises:
        ValueError: If ``patch_size`` is odd.
    """

    channels = 64  # of the map

    def __init__(
        self,
        in_channels: int,
        embed_dims: int,
        patch_size: int,
        norm_cfg: dict | None,
        bias: bool = True,
    ) -> None:
        if patch_size % 2:
            raise ValueError(f'patch_size must be an even number, got {patch_size}')
        super().__init__(self.channels, embed_dims, patch_size // 2, norm_cfg, bias)
        self.conv1 = nn.Conv2d(in_channels, self.channels, 7, stride=2, padding=3, bias=False)
        self.conv2 = nn.Conv2d(self.channels, self.channels, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(self.channels, self.channels, 3, padding=1, bias=False)
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(self.channels) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Map images (B, in_channels, H, W) to tokens, as ``PatchEmbed`` does."""
        x = _pad_to_multiple(x, 2 * self.patch_size)
        x = F.relu(conv_norm(x, self.conv1, self.bn1))
        x = F.relu(conv_norm(x, self.conv2, self.bn2))
        x = F.relu(conv_norm(x, self.conv3, self.bn3))
        return super().forward(x)


class PatchMerging(BaseModule):
    """Merge 2 x 2 neighbouring tokens into one (Swin, section 3.1).

    Args:
        in_channels: Channels C of a token.
        out_channels: Channels of a merged token.
        stride: Step between merged neighbourhoods, in tokens.
        norm_cfg: Normalization of the 4C concatenated channels, or None.
    """

    kernel_size = 2

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, norm_cfg: dict | None
    ) -> None:
        super().__init__()
        self.stride = stride
        self.out_channels = out_channels
        dims = self.kernel_size**2 * in_channels
        self.norm = build_norm_layer(norm_cfg, dims)[1] if norm_cfg else nn.Identity()
        self.reduction = Linear(dims, out_channels, bias=False)

    def forward(self, x_BNC: Tensor, hw: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Map tokens (B, N, C) to merged tokens and their size; zeros pad right and bottom."""
        b, _, c = x_BNC.shape
        k = self.kernel_size
        x = _pad_to_cover(x_BNC.view(b, *hw, c), k, self.stride)
        if self.stride == k:
            x = x.unflatten(2, (-1, k)).unflatten(1, (-1, k)).transpose(2, 3)
        else:
            x = x.unfold(1, k, self.stride).unfold(2, k, self.stride).permute(0, 1, 2, 4, 5, 3)
        out_hw = tuple(x.shape[1:3])
        x_BN4C = x.reshape(b, -1, k * k, c)
        return self._reduce(x_BN4C), out_hw

    def _reduce(self, x_BN4C: Tensor) -> Tensor:
        norm, fc = self.norm, self.reduction
        if not (is_plain(norm, nn.LayerNorm, nn.Identity) and is_plain(fc, Linear)):
            return fc(norm(x_BN4C.transpose(2, 3).flatten(2)))
        # The weights have torch's unfold in mind, with channels outermost. Channels stay together
        # where weights are reordered in place of tokens.
        x, c = x_BN4C.flatten(2), x_BN4C.shape[3]
        if isinstance(norm, nn.LayerNorm):
            weight, bias = (p.view(c, -1).t().flatten() for p in (norm.weight, norm.bias))
            x = F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)
        weight = fc.weight.unflatten(1, (c, -1)).transpose(1, 2).flatten(1)
        return linear(x, weight, fc.bias)


def _pad_to_multiple(x_BCHW: Tensor, size: int) -> Tensor:
    bottom, right = (-s % size for s in x_BCHW.shape[2:])
    return F.pad(x_BCHW, (0, right, 0, bottom)) if bottom or right else x_BCHW


def _pad_to_cover(x_BHWC: Tensor, kernel: int, stride: int) -> Tensor:
    """Pad such that every ``stride``-th position starts a full kernel."""
    pad = [max((-(-s // stride) - 1) * stride + kernel - s, 0) for s in x_BHWC.shape[1:3]]
    return F.pad(x_BHWC, (0, 0, 0, pad[1], 0, pad[0])) if any(pad) else x_BHWC
