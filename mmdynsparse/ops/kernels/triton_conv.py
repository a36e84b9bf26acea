"""Triton kernel ``cell_conv``: a convolution at chosen cells as an implicit matrix product.

A row of the product is an output position of a chosen cell, a column an output channel, and the
sum runs over taps and input channels. Input positions are read where they lie, so there is no
gathered copy with halos; neighbouring positions and cells share them in the cache. One loop runs
over taps and channels, so that the pipeline of loads fills once.

Inference only: training runs masked, with both paths everywhere. Sums are float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cells import cell_grid
from .arguments import check_cell_conv, tensors_of
from .triton_common import block_of, check_launch, dot, grid_of, size_class, tuned, widen

# Without a layer norm in the loop the registers hold more columns.
WIDE_BLOCKS = ((128, 256, 64, 8, 3),)


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
        cell_size: Side g of a cell, in positions.
        weight: (C_out, C_in, k, k) with k 1 or 3; copied if it is not in channels_last.
        bias: (C_out,) or None.
        dilation: Of the convolution. Defaults to 1.
        relu: Whether to end with a ReLU. Defaults to False.

    Returns:
        (K, C_out, g, g), contiguous in channels_last. Where a cell reaches over the map's edge,
        the values outside of the map mean nothing and are to be cut off.

    Raises:
        ValueError: If shapes, types or the device do not fit.
        RuntimeError: If an input requires a gradient.
    """
    check_cell_conv(x_BCHW, cells_K, cell_size, weight, bias, dilation)
    check_launch('cell_conv', tensors_of(x_BCHW, cells_K, weight, bias))
    k, c_out, g = len(cells_K), weight.shape[0], cell_size
    height, width = x_BCHW.shape[2:]
    out_KCgg = x_BCHW.new_empty(k, g, g, c_out).permute(0, 3, 1, 2)
    if k == 0:
        return out_KCgg
    weight = weight.contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.contiguous()
    rows = k * g * g
    counts = (rows, size_class(rows), height, width, *cell_grid((height, width), g))
    sizes = dict(C_IN=x_BCHW.shape[1], C_OUT=c_out, CELL=g, KERNEL=weight.shape[-1])
    options = dict(DILATION=dilation, RELU=relu, WIDEN=widen(x_BCHW))
    _conv[grid_of(rows, c_out)](
        x_BCHW, cells_K.contiguous(), weight, bias, out_KCgg, *counts, **sizes, **options
    )
    return out_KCgg


@triton.jit(do_not_specialize=['rows', 'rows_class'])
def conv_kernel(
    x_ptr,
    cells_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rows,
    rows_class,
    height,
    width,
    cell_rows,
    cell_cols,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    CELL: tl.constexpr,
    KERNEL: tl.constexpr,
    DILATION: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Positions of chosen cells of x (B, H, W, C_IN) -> weight (C_OUT, k, k, C_IN), bias, ReLU."""
    STEPS: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K
    row_M, n = block_of(C_OUT, BLOCK_M, BLOCK_N)
    valid_M = row_M < rows
    cell_M = tl.load(cells_ptr + row_M // (CELL * CELL), mask=valid_M, other=0)
    y_M = cell_M // cell_cols % cell_rows * CELL + row_M % (CELL * CELL) // CELL
    x_M = cell_M % cell_cols * CELL + row_M % CELL
    image_M = cell_M // (cell_rows * cell_cols) * height
    acc = tl.full((BLOCK_M, BLOCK_N), 0, tl.float32)
    for step in range(KERNEL * KERNEL * STEPS):
        tap = step // STEPS
        c = step % STEPS * BLOCK_K + tl.arange(0, BLOCK_K)
        v_M = y_M + (tap // KERNEL - KERNEL // 2) * DILATION
        u_M = x_M + (tap % KERNEL - KERNEL // 2) * DILATION
        inside_M = valid_M & (v_M >= 0) & (v_M < height) & (u_M >= 0) & (u_M < width)
        place_M = ((image_M + v_M) * width + u_M) * C_IN
        values = tl.load(
            x_ptr + place_M[:, None] + c[None, :],
            mask=inside_M[:, None] & (c[None, :] < C_IN),
            other=0,
        )
        weight = tl.load(
            weight_ptr + (n[None, :] * (KERNEL * KERNEL) + tap) * C_IN + c[:, None],
            mask=(n[None, :] < C_OUT) & (c[:, None] < C_IN),
            other=0,
        )
        acc = dot(values, weight, acc, WIDEN)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < C_OUT, other=0).to(tl.float32)[None, :]
    if RELU:
        acc = tl.maximum(acc, 0)
    tl.store(
        out_ptr + row_M.to(tl.int64)[:, None] * C_OUT + n[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=valid_M[:, None] & (n[None, :] < C_OUT),
    )


_conv = tuned(conv_kernel, ['rows_class', 'C_IN', 'C_OUT', 'KERNEL', 'CELL'], WIDE_BLOCKS)
