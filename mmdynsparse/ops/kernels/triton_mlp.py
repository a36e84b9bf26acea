"""Triton kernels of ``sparse_mlp``: three, no gathered copy of the tokens.

1. hidden: gather rows, LayerNorm, first product, bias, GELU -> hidden (K, H)
2. output: second product, bias, LayerScale, residual, scatter to the kept rows
3. fast: gather, LayerNorm, product, bias, LayerScale, residual, scatter to the dropped rows

The layer norm is applied to each block of rows on its way into the product rather than folded
into weights and result (``rstd * (x @ W' - mean * sum(W'))``). Folding needs derived weights that
must follow the parameters, and where a row's mean is large against its deviation it subtracts two
large numbers. Here the normalised value is rounded once to the dtype of the weight. Each program
reads its rows twice, for the statistics and for the product; the second time they are in the cache.

Inference only: training runs masked, with both paths everywhere. Statistics, sums, GELU and
the update are float32, whatever the dtype of the tensors. Dimension letters: P tokens of the
batch, K kept and M dropped ones, C channels, H hidden channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import LinearWeights, MlpWeights, check_sparse_mlp, contiguous, tensors_of
from .triton_common import block_of, check_launch, dot, grid_of, size_class, tuned, widen


def sparse_mlp(
    x_PC: Tensor,
    residual_PC: Tensor,
    kept_K: Tensor,
    dropped_M: Tensor,
    mlp: MlpWeights,
    fast: LinearWeights | None = None,
) -> Tensor:
    """Add the slow path's update at kept tokens and the fast path's at dropped ones.

    Products are in the dtype of the matrices; all other tensors may have another, as they do under
    autocast.

    Args:
        x_PC: Tokens (P, C), float32, float16 or bfloat16, the input of both paths.
        residual_PC: What the update is added to, (P, C); may be ``x_PC`` itself.
        kept_K: int64 positions of the kept tokens, in any order; one may be there several times.
        dropped_M: int64 positions of all others, likewise; either may be empty.
        mlp: The slow path.
        fast: The fast path. Defaults to None, which leaves dropped tokens as they are.

    Returns:
        (P, C), in the dtype of ``residual_PC``; a new tensor.

    Raises:
        ValueError: If shapes, types or the device do not fit.
        RuntimeError: If an input requires a gradient.
    """
    check_sparse_mlp(x_PC, residual_PC, kept_K, dropped_M, mlp, fast)
    check_launch('sparse_mlp', tensors_of(x_PC, residual_PC, kept_K, mlp, fast or ()))
    x_PC, residual_PC = x_PC.contiguous(), residual_PC.contiguous()
    # With both paths, every row is written.
    out_PC = residual_PC.clone() if fast is None else torch.empty_like(residual_PC)
    if len(kept_K):
        _slow(x_PC, residual_PC, kept_K.contiguous(), mlp, out_PC)
    if fast is not None and len(dropped_M):
        _fast(x_PC, residual_PC, dropped_M.contiguous(), fast, out_PC)
    return out_PC


def _slow(x_PC: Tensor, residual_PC: Tensor, kept_K: Tensor, w: MlpWeights, out: Tensor) -> None:
    w, k, c, h = contiguous(w), len(kept_K), x_PC.shape[1], len(w.bias1)
    hidden_KH = w.weight1.new_empty(k, h)
    norm, rows = (w.norm_weight, w.norm_bias), (k, size_class(k))
    sizes = dict(C=c, H=h, WIDEN=widen(w.weight1))
    _hidden[grid_of(k, h)](
        x_PC, kept_K, *norm, w.weight1, w.bias1, hidden_KH, *rows, w.eps, **sizes
    )
    _output[grid_of(k, c)](
        hidden_KH, kept_K, w.weight2, w.bias2, w.gamma, residual_PC, out, *rows, **sizes
    )


def _fast(
    x_PC: Tensor, residual_PC: Tensor, dropped_M: Tensor, w: LinearWeights, out: Tensor
) -> None:
    w, m, c = contiguous(w), len(dropped_M), x_PC.shape[1]
    norm, rows = (w.norm_weight, w.norm_bias), (m, size_class(m))
    linear, sizes = (w.weight, w.bias, w.gamma), dict(C=c, WIDEN=widen(w.weight))
    _linear[grid_of(m, c)](x_PC, dropped_M, *norm, *linear, residual_PC, out, *rows, w.eps, **sizes)


@triton.jit
def row_statistics(x_ptr, token_M, eps, C: tl.constexpr, BLOCK_K: tl.constexpr):
    """Mean and reciprocal deviation of the rows.

    Sums are taken of the distances from a row's first channel, so that a large mean, which all
    channels share, does not swamp the deviation.
    """
    first_M = tl.load(x_ptr + token_M * C).to(tl.float32)
    sum_M = first_M * 0
    square_M = first_M * 0
    for start in range(0, C, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + token_M[:, None] * C + c[None, :], mask=c[None, :] < C, other=0)
        x = tl.where(c[None, :] < C, x.to(tl.float32) - first_M[:, None], 0)
        sum_M += tl.sum(x, 1)
        square_M += tl.sum(x * x, 1)
    mean_M = sum_M / C
    variance_M = tl.maximum(square_M / C - mean_M * mean_M, 0)
    return first_M + mean_M, tl.rsqrt(variance_M + eps)


@triton.jit
def normed_product(
    x_ptr,
    token_M,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_ptr,
    n,
    eps,
    C: tl.constexpr,
    N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """LayerNorm of the rows ``token_M`` times the columns ``n`` of a weight (N, C), in float32."""
    mean_M, rstd_M = row_statistics(x_ptr, token_M, eps, C, BLOCK_K)
    acc = tl.full((token_M.shape[0], n.shape[0]), 0, tl.float32)
    for start in range(0, C, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + token_M[:, None] * C + c[None, :], mask=c[None, :] < C, other=0)
        # Past the last channel both are zero, and so is the normalised value.
        scale = tl.load(norm_weight_ptr + c, mask=c < C, other=0).to(tl.float32)
        shift = tl.load(norm_bias_ptr + c, mask=c < C, other=0).to(tl.float32)
        weight = tl.load(
            weight_ptr + n[None, :] * C + c[:, None],
            mask=(n[None, :] < N) & (c[:, None] < C),
            other=0,
        )
        x = (x.to(tl.float32) - mean_M[:, None]) * rstd_M[:, None] * scale[None, :]
        x = (x + shift[None, :]).to(weight.dtype)
        acc = dot(x, weight, acc, WIDEN)
    return acc


@triton.jit
def store_update(
    update, token_M, valid_M, n, bias_ptr, gamma_ptr, residual_ptr, out_ptr, C: tl.constexpr
):
    """Add bias, scale by gamma, add the residual and write to the rows ``token_M``."""
    update += tl.load(bias_ptr + n, mask=n < C, other=0).to(tl.float32)[None, :]
    if gamma_ptr is not None:
        update *= tl.load(gamma_ptr + n, mask=n < C, other=0).to(tl.float32)[None, :]
    place = token_M[:, None] * C + n[None, :]
    mask = valid_M[:, None] & (n[None, :] < C)
    update += tl.load(residual_ptr + place, mask=mask, other=0).to(tl.float32)
    tl.store(out_ptr + place, update.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['rows', 'rows_class'])
def hidden_kernel(
    x_ptr,
    kept_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_ptr,
    bias_ptr,
    hidden_ptr,
    rows,
    rows_class,
    eps,
    C: tl.constexpr,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Kept rows -> LayerNorm -> weight (H, C), bias -> exact GELU -> hidden (rows, H)."""
    row_M, n = block_of(H, BLOCK_M, BLOCK_N)
    # Rows past the last one compute token 0 again and are not stored.
    token_M = tl.load(kept_ptr + row_M, mask=row_M < rows, other=0)
    acc = normed_product(
        x_ptr, token_M, norm_weight_ptr, norm_bias_ptr, weight_ptr, n, eps, C, H, BLOCK_K, WIDEN
    )
    acc += tl.load(bias_ptr + n, mask=n < H, other=0).to(tl.float32)[None, :]
    hidden = 0.5 * acc * (1 + tl.erf(acc * 0.7071067811865476))
    tl.store(
        hidden_ptr + row_M.to(tl.int64)[:, None] * H + n[None, :],
        hidden.to(hidden_ptr.dtype.element_ty),
        mask=(row_M[:, None] < rows) & (n[None, :] < H),
    )


@triton.jit(do_not_specialize=['rows', 'rows_class'])
def output_kernel(
    hidden_ptr,
    kept_ptr,
    weight_ptr,
    bias_ptr,
    gamma_ptr,
    residual_ptr,
    out_ptr,
    rows,
    rows_class,
    C: tl.constexpr,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Hidden (rows, H) -> weight (C, H), bias -> gamma -> residual -> kept rows of the result."""
    row_M, n = block_of(C, BLOCK_M, BLOCK_N)
    valid_M = row_M < rows
    acc = tl.full((BLOCK_M, BLOCK_N), 0, tl.float32)
    for start in range(0, H, BLOCK_K):
        h = start + tl.arange(0, BLOCK_K)
        hidden = tl.load(
            hidden_ptr + row_M.to(tl.int64)[:, None] * H + h[None, :],
            mask=valid_M[:, None] & (h[None, :] < H),
            other=0,
        )
        weight = tl.load(
            weight_ptr + n[None, :] * H + h[:, None],
            mask=(n[None, :] < C) & (h[:, None] < H),
            other=0,
        )
        acc = dot(hidden, weight, acc, WIDEN)
    token_M = tl.load(kept_ptr + row_M, mask=valid_M, other=0)
    store_update(acc, token_M, valid_M, n, bias_ptr, gamma_ptr, residual_ptr, out_ptr, C)


@triton.jit(do_not_specialize=['rows', 'rows_class'])
def linear_kernel(
    x_ptr,
    dropped_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_ptr,
    bias_ptr,
    gamma_ptr,
    residual_ptr,
    out_ptr,
    rows,
    rows_class,
    eps,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Dropped rows -> LayerNorm -> weight (C, C), bias -> gamma -> residual -> the same rows."""
    row_M, n = block_of(C, BLOCK_M, BLOCK_N)
    valid_M = row_M < rows
    token_M = tl.load(dropped_ptr + row_M, mask=valid_M, other=0)
    acc = normed_product(
        x_ptr, token_M, norm_weight_ptr, norm_bias_ptr, weight_ptr, n, eps, C, C, BLOCK_K, WIDEN
    )
    store_update(acc, token_M, valid_M, n, bias_ptr, gamma_ptr, residual_ptr, out_ptr, C)


_hidden = tuned(hidden_kernel, ['rows_class', 'C', 'H'])
_output = tuned(output_kernel, ['rows_class', 'C', 'H'])
_linear = tuned(linear_kernel, ['rows_class', 'C'])
