"""Arguments of the kernels: weights as values, and their checks.

Nothing here looks at a tensor's values, which would wait for the device.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class MlpWeights(NamedTuple):
    """The slow path: ``gamma * (weight2 @ gelu(weight1 @ LayerNorm(x) + bias1) + bias2)``.

    Attributes:
        eps: Of the layer norm.
        weight1, bias1: (H, C) and (H,).
        weight2: (C, H). All other tensors are (C,).
        gamma: LayerScale, or None for none. Defaults to None.
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

    Tensors are (C,) but for ``weight``, which is (C, C); the rest is as in :class:`MlpWeights`.
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


def contiguous(weights: MlpWeights | LinearWeights) -> MlpWeights | LinearWeights:
    """Return the weights, contiguous in memory."""
    return weights._make(v.contiguous() if isinstance(v, Tensor) else v for v in weights)


def check_sparse_mlp(
    x_PC: Tensor,
    residual_PC: Tensor,
    kept_K: Tensor,
    dropped_M: Tensor,
    mlp: MlpWeights,
    fast: LinearWeights | None,
) -> None:
    """Raise a ValueError if shapes or types of the arguments of ``sparse_mlp`` do not fit."""
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
    matrices = [mlp.weight1, mlp.weight2]
    _check_weights('mlp', mlp, c, weight1=(h, c), bias1=(h,), weight2=(c, h))
    if fast is not None:
        matrices.append(fast.weight)
        _check_weights('fast', fast, c, weight=(c, c))
    _check_dtypes(tensors_of(x_PC, residual_PC, mlp, fast or ()), 'matrices', matrices)


def check_cell_conv(
    x_BCHW: Tensor,
    cells_K: Tensor,
    cell_size: int,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int,
) -> None:
    """Raise a ValueError if shapes or types of the arguments of ``cell_conv`` do not fit."""
    if x_BCHW.ndim != 4:
        raise ValueError(f'x_BCHW must have 4 dimensions, got shape {tuple(x_BCHW.shape)}')
    if not x_BCHW.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f'x_BCHW must be contiguous in channels_last, got strides {tuple(x_BCHW.stride())} '
            f'for shape {tuple(x_BCHW.shape)}'
        )
    _check_index('cells_K', cells_K)
    for name, value in (('cell_size', cell_size), ('dilation', dilation)):
        if value < 1:
            raise ValueError(f'{name} must be at least 1, got {value}')
    if tuple(weight.shape[2:]) not in ((1, 1), (3, 3)):
        raise ValueError(
            f'weight must be (C_out, C_in, k, k) with k 1 or 3, got shape {tuple(weight.shape)}'
        )
    _check_shape('weight', weight, (weight.shape[0], x_BCHW.shape[1], *weight.shape[2:]))
    if bias is not None:
        _check_shape('bias', bias, (weight.shape[0],))
    tensors = tensors_of(x_BCHW, weight, bias)
    _check_dtypes(tensors, 'input, weight and bias', tensors)


def _check_weights(name: str, weights: MlpWeights | LinearWeights, c: int, **shapes: tuple) -> None:
    """Check the shapes of weights, which are (c,) where nothing else is given."""
    for field, value in weights._asdict().items():
        if isinstance(value, Tensor):
            _check_shape(f'{name}.{field}', value, shapes.get(field, (c,)))


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
