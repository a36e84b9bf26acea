"""Convolution and batch norm as one."""

import torch.nn.functional as F
from torch import Tensor, nn


def conv_norm(x: Tensor, conv: nn.Conv2d, norm: nn.Module, padding: int | None = None) -> Tensor:
    """Apply a convolution without bias and the batch norm that follows it.

    A norm in eval mode is an affine map of each channel. It is folded into the weights where these
    are fewer than the outputs, that is, where scaling the weights costs less than another pass
    over the map; nothing is cached, so there is nothing to keep in step with the parameters.

    Args:
        x: (B, C_in, H, W).
        conv: The convolution.
        norm: Batch norm of its outputs.
        padding: Replaces the padding of ``conv``; tiles with a halo take 0. Defaults to None.

    Returns:
        (B, C_out, H', W')
    """
    padding = conv.padding if padding is None else padding
    geometry = (conv.stride, padding, conv.dilation)
    positions = x.shape[0] * x.shape[2] * x.shape[3] // (conv.stride[0] * conv.stride[1])
    if norm.training or conv.weight.numel() >= conv.out_channels * positions:
        return norm(F.conv2d(x, conv.weight, None, *geometry))
    return F.conv2d(x, *fold_norm(conv, norm), *geometry)


def fold_norm(conv: nn.Conv2d, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a convolution with its batch norm, in eval mode, folded in."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return conv.weight * scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale
