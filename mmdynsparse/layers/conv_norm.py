"""Convolutions of maps and tiles, and the norms that follow them."""

from math import prod

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops import conv2d, is_exporting
from .plain import is_plain


def conv_norm(x: Tensor, conv: nn.Module, norm: nn.Module, halo: int = 0) -> Tensor:
    """Apply a convolution and the norm that follows it.

    A batch norm in eval mode is an affine map of each channel. It is folded into the weights where
    these are fewer than the outputs: there, scaling the weights costs less than another pass over
    the map. Nothing is cached, so nothing can fall behind the parameters.

    Args:
        x: (B, C_in, H, W).
        conv: The convolution.
        norm: Norm of its outputs.
        halo: As of :func:`convolve`. Defaults to 0.

    Returns:
        (B, C_out, H', W')
    """
    if norm.training or not can_fold(conv, norm):
        return norm(convolve(x, conv, halo))
    # What is exported has weights that are folded once.
    outputs = conv.out_channels * x.shape[0] * x.shape[2] * x.shape[3] // prod(conv.stride)
    if not is_exporting() and conv.weight.numel() >= outputs:
        return norm(convolve(x, conv, halo))
    geometry = (conv.stride, 0 if halo else conv.padding, conv.dilation, conv.groups)
    return conv2d(x, *fold_norm(conv, norm), *geometry)


def convolve(x: Tensor, conv: nn.Module, halo: int = 0) -> Tensor:
    """Apply a convolution to a map, or to tiles with a halo.

    Args:
        x: (B, C_in, H, W).
        conv: The convolution. If there is a halo, it is one that keeps the size of a map.
        halo: Positions at each side of a tile that stand for the padding; the output has none of
            them. Defaults to 0, a whole map.

    Returns:
        (B, C_out, H', W')
    """
    if is_plain(conv, nn.Conv2d) and conv.padding_mode == 'zeros':
        geometry = (conv.stride, 0 if halo else conv.padding, conv.dilation, conv.groups)
        return conv2d(x, conv.weight, conv.bias, *geometry)
    # mmcv's deformable convolutions read any map as if it were contiguous.
    return crop(conv(x if isinstance(conv, nn.Conv2d) else x.contiguous()), halo)


def crop(x: Tensor, halo: int) -> Tensor:
    """Cut ``halo`` positions off each side of a map (B, C, H, W)."""
    return x[:, :, halo:-halo, halo:-halo] if halo else x


def can_fold(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether ``fold_norm`` says what the two layers do in eval mode."""
    # By its forward, because a reverted SyncBN is of a type of mmengine's own.
    known = type(norm).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    if not known or not is_plain(norm, type(norm)) or not is_plain(conv, nn.Conv2d):
        return False
    return conv.bias is None and norm.affine and norm.track_running_stats


def fold_norm(conv: nn.Conv2d, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a convolution with its batch norm, in eval mode, folded in."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return conv.weight * scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale
