"""Arguments of the kernels: weights as values, and their checks.

Nothing here looks at a tensor's values, which would wait for the device.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class MlpWeights(NamedTuple):
    """The slow path: ``gamma * (weight2 @ gelu(weight1 @ LayerNorm(x) + bias1) + bias2)``.

    Attributes:
        norm_weight: (C,).
        norm_bias: (C,).
        eps: Of the layer norm.
        weight1: (H, C).
        bias1: (H,).
        weight2: (C, H).
        bias2: (C,).
        gamma: LayerScale (C,), or None for none. Defaults to None.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    eps: float
    weight1: Tensor
    bias1: Tensor
    weight2: Tensor
    bias2: Tensor
    gamma: Tensor | None = None


class LinearWeights(NamedTuple):
    """The fast path: ``gamma * (weight @ LayerNorm(x) + bias)``.

    Attributes:
        norm_weight: (C,).
        norm_bias: (C,).
        eps: Of the layer norm.
        weight: (C, C).
        bias: (C,).
        gamma: LayerScale (C,), or None for none. Defaults to None.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    eps: float
    weight: Tensor
    bias: Tensor
    gamma: Tensor | None = None


def tensors_of(*values: object) -> list[Tensor]:
    """Return the tensors among the values, those inside of named tuples included."""
    flat = [v for value in values for v in (value if isinstance(value, tuple) else (value,))]
    return [v for v in flat if isinstance(v, Tensor)]


def check_sparse_mlp(
    x_PC: Tensor,
    residual_PC: Tensor,
    kept_K: Tensor,
    dropped_M: Tensor,
    mlp: MlpWeights,
    fast: LinearWeights | None,
) -> None:
    """Check shapes and types of the arguments of ``sparse_mlp``.

    Raises:
        ValueError: If one of them does not fit; the message says which.
    """
    if x_PC.ndim != 2:
        raise ValueError(f'x_PC must have 2 dimensions, got shape {tuple(x_PC.shape)}')
    p, c = x_PC.shape
    h = len(mlp.bias1)
    _check_shape('residual_PC', residual_PC, (p, c))
    _check_index('kept_K', kept_K)
    _check_index('dropped_M', dropped_M)
    if len(kept_K) + len(dropped_M) < p:  # with static shapes some are there twice
        raise ValueError(
            f'kept_K and dropped_M must hold all {p} rows of x_PC together, '
            f'got {len(kept_K)} and {len(dropped_M)}'
        )
    shapes = dict(weight1=(h, c), bias1=(h,), weight2=(c, h), bias2=(c,))
    _check_weights('mlp', mlp, c, shapes)
    if fast is not None:
        _check_weights('fast', fast, c, dict(weight=(c, c), bias=(c,)))
    matrices = [mlp.weight1, mlp.weight2] + ([] if fast is None else [fast.weight])
    _check_dtypes(tensors_of(x_PC, residual_PC, mlp, fast or ()), 'matrices', matrices)


def check_cell_conv(
    x_BCHW: Tensor,
    cells_K: Tensor,
    cell_size: int,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int,
) -> None:
    """Check shapes and types of the arguments of ``cell_conv``.

    Raises:
        ValueError: If one of them does not fit; the message says which.
    """
    if x_BCHW.ndim != 4:
        raise ValueError(f'x_BCHW must have 4 dimensions, got shape {tuple(x_BCHW.shape)}')
    if not x_BCHW.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f'x_BCHW must be contiguous in channels_last, got strides {tuple(x_BCHW.stride())} '
            f'for shape {tuple(x_BCHW.shape)}'
        )
    _check_index('cells_K', cells_K)
    if cell_size < 1:
        raise ValueError(f'cell_size must be at least 1, got {cell_size}')
    if dilation < 1:
        raise ValueError(f'dilation must be at least 1, got {dilation}')
    if tuple(weight.shape[2:]) not in ((1, 1), (3, 3)):
        raise ValueError(
            f'weight must be (C_out, C_in, k, k) with k 1 or 3, got shape {tuple(weight.shape)}'
        )
    _check_shape('weight', weight, (weight.shape[0], x_BCHW.shape[1], *weight.shape[2:]))
    if bias is not None:
        _check_shape('bias', bias, (weight.shape[0],))
    tensors = tensors_of(x_BCHW, weight, bias)
    _check_dtypes(tensors, 'input, weight and bias', tensors)


def _check_weights(
    name: str, weights: MlpWeights | LinearWeights, c: int, shapes: dict[str, tuple[int, ...]]
) -> None:
    shapes = dict(norm_weight=(c,), norm_bias=(c,), **shapes)
    if weights.gamma is not None:
        shapes['gamma'] = (c,)
    for field, shape in shapes.items():
        _check_shape(f'{name}.{field}', getattr(weights, field), shape)


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f'{name} must have shape {shape}, got {tuple(tensor.shape)}')


def _check_index(name: str, index: Tensor) -> None:
    if index.ndim != 1 or index.dtype != torch.int64:
        raise ValueError(
            f'{name} must be int64 of 1 dimension, got {index.dtype} of shape {tuple(index.shape)}'
        )


def _check_dtypes(tensors: list[Tensor], names: str, alike: list[Tensor]) -> None:
    for x in tensors:
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f'tensors must be float32, float16 or bfloat16, got {x.dtype}')

    for x in alike[1:]:
        if x.dtype != alike[0].dtype:
            raise ValueError(f'{names} must have one dtype {alike[0].dtype}, got {x.dtype}')
