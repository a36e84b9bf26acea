"""Reference forms of the ops: plain torch, on any device, differentiable.

Dimension letters: P tokens of the whole batch (B * N), K kept and M dropped ones (for a
convolution: K cells), C channels, H hidden channels; for maps B images, C channels, H height,
W width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cells import map_tiles
from .arguments import LinearWeights, MlpWeights, check_cell_conv, check_sparse_mlp


def sparse_mlp(
    x_PC: Tensor,
    residual_PC: Tensor,
    kept_K: Tensor,
    dropped_M: Tensor,
    mlp: MlpWeights,
    fast: LinearWeights | None = None,
) -> Tensor:
    """Add the slow path's update at kept tokens and the fast path's at dropped ones.

    Args:
        x_PC: Tokens (P, C), float32, float16 or bfloat16, the input of both paths.
        residual_PC: What the update is added to, (P, C); may be ``x_PC`` itself.
        kept_K: int64 positions of the kept tokens, in any order; one may be there several times.
        dropped_M: int64 positions of all others, likewise; either may be empty.
        mlp: The slow path.
        fast: The fast path. Defaults to None, which leaves dropped tokens as they are.

    Returns:
        (P, C), in the dtype of ``x_PC``; a new tensor.

    Raises:
        ValueError: Shapes or types do not fit.
    """
    check_sparse_mlp(x_PC, residual_PC, kept_K, dropped_M, mlp, fast)
    slow_KC = _mlp(x_PC.index_select(0, kept_K), mlp)
    out_PC = residual_PC.index_copy(0, kept_K, slow_KC + residual_PC.index_select(0, kept_K))
    if fast is not None:
        fast_MC = _linear(x_PC.index_select(0, dropped_M), fast)
        out_PC.index_copy_(0, dropped_M, fast_MC + residual_PC.index_select(0, dropped_M))
    return out_PC


def cell_conv(
    x_BCHW: Tensor,
    cells_K: Tensor,
    cell_size: int,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int = 1,
    relu: bool = False,
) -> Tensor:
    """Convolve a map at chosen square cells only, with stride 1 and zeros around the map.

    Args:
        x_BCHW: Feature maps, contiguous in channels_last.
        cells_K: Flat int64 indices ``b * rows * cols + row * cols + col`` of the cells, where the
            grid has ``rows = ceil(H / cell_size)`` and ``cols = ceil(W / cell_size)``.
        cell_size: Side g of a cell in positions.
        weight: (C_out, C_in, k, k) with k 1 or 3. The Triton form reads it in channels_last and
            copies one that is not.
        bias: (C_out,) or None.
        dilation: Defaults to 1.
        relu: Whether to end with a ReLU. Defaults to False.

    Returns:
        (K, C_out, g, g), contiguous in channels_last. Where a cell reaches over the map's edge,
        the values outside of the map mean nothing and are to be cut off.

    Raises:
        ValueError: Shapes or types do not fit.
    """
    check_cell_conv(x_BCHW, cells_K, cell_size, weight, bias, dilation)
    halo = dilation * (weight.shape[-1] // 2)
    tiles = map_tiles(x_BCHW, cells_K, cell_size, halo)
    out = F.conv2d(tiles, weight, bias, dilation=dilation)
    out = out.contiguous(memory_format=torch.channels_last)
    return out.relu_() if relu else out


def _mlp(x_KC: Tensor, w: MlpWeights) -> Tensor:
    x_KC = F.layer_norm(x_KC, x_KC.shape[-1:], w.norm_weight, w.norm_bias, w.eps)
    hidden_KH = F.gelu(F.linear(x_KC, w.weight1, w.bias1))
    return _scaled(F.linear(hidden_KH, w.weight2, w.bias2), w.gamma)


def _linear(x_MC: Tensor, w: LinearWeights) -> Tensor:
    x_MC = F.layer_norm(x_MC, x_MC.shape[-1:], w.norm_weight, w.norm_bias, w.eps)
    return _scaled(F.linear(x_MC, w.weight, w.bias), w.gamma)


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else x * gamma
