"""mmcv's ConvModule (convolution, norm, activation) on tiles, and with running statistics."""

import torch
from mmcv.cnn import ConvModule
from mmengine.utils import to_2tuple
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from .conv_norm import conv_norm, convolve, crop
from .plain import is_plain


def conv_module(
    module: ConvModule, x: Tensor, padding: int | None = None, light: bool = False
) -> Tensor:
    """Apply a ConvModule.

    Args:
        module: With a plain convolution; its norm, if it has one, is a batch norm.
        x: (B, C_in, H, W).
        padding: Replaces that of the convolution; tiles with a halo take 0. Defaults to None.
        light: As of :func:`norm_act`.

    Returns:
        (B, C_out, H', W')
    """
    halo = 0 if padding is None else to_2tuple(module.padding)[0] - padding
    training = module.with_norm and module.norm.training
    if not is_plain(module, ConvModule) and not (light and training):
        return crop(module(x), halo)
    if module.with_norm and not training:
        return _act(module, conv_norm(x, module.conv, module.norm, halo))
    return norm_act(module, convolve(x, module.conv, halo), light)


def norm_act(module: ConvModule, x: Tensor, light: bool = False) -> Tensor:
    """Apply the norm and the activation of a ConvModule to the output of its convolution.

    Args:
        module: As of :func:`conv_module`.
        x: (B, C, H, W).
        light: Whether x is a light path's, seldom what inference needs: in training it is
            normalized by the running statistics, as at inference, and does not change them.
            Defaults to False.
    """
    if module.with_norm:
        norm = module.norm
        x = _by_running_statistics(norm, x) if light and norm.training else norm(x)
    return _act(module, x)


def _by_running_statistics(norm: nn.Module, x: Tensor) -> Tensor:
    # Copies: the slow path may update the statistics before this is differentiated.
    statistics = {name: value.clone() for name, value in norm.named_buffers()}
    norm.eval()
    x = functional_call(norm, statistics, (x,))
    norm.train()
    return x


def check_conv_modules(parent: nn.Module, names: str) -> None:
    """Raise a ValueError, which blames ``names``, if a ConvModule cannot run on tiles.

    It can with a plain convolution and no norm but an affine batch norm with running statistics.
    """
    for module in parent.modules():
        if not isinstance(module, ConvModule):
            continue
        norm = module.norm if module.with_norm else None
        plain = type(module.conv) is nn.Conv2d and not module.with_explicit_padding
        folds = norm is None or (
            isinstance(norm, _BatchNorm) and norm.affine and norm.track_running_stats
        )
        if not plain or not folds:
            raise ValueError(
                f'{names} must be a plain convolution and an affine batch norm with running '
                f'statistics or None in a sparse part, got {module.conv} and {norm}'
            )


def _act(module: ConvModule, x: Tensor) -> Tensor:
    if not module.with_activation:
        return x
    if is_plain(module.activate, nn.ReLU) and not torch.is_grad_enabled():
        return x.relu_()  # x is new here, and another map of its size costs page faults
    return module.activate(x)
