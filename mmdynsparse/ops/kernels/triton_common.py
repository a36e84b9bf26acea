"""Parts of all Triton kernels: checks, tuning, the matrix product.

In Triton's interpreter (``TRITON_INTERPRET=1`` before this module is imported) the kernels run on
the CPU, for tests. It holds bfloat16 as raw bits, so that a product of them has to be widened to
float32 first; products of bfloat16 are exact in float32, as on the tensor cores.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows, columns, depth of a block, warps, stages of the software pipeline.
HALF_BLOCKS = (
    (128, 128, 64, 8, 3),
    (128, 64, 64, 4, 3),
    (64, 128, 64, 4, 3),
    (64, 64, 128, 4, 3),
    (64, 64, 64, 4, 4),
    (64, 64, 32, 4, 4),
    (32, 64, 128, 4, 3),
    (32, 64, 64, 4, 4),
    (32, 32, 64, 2, 4),
)
# Full float32 products run without tensor cores: small blocks, or the registers overflow.
FLOAT_BLOCKS = ((64, 64, 16, 8, 3), (64, 32, 32, 4, 3), (32, 64, 32, 4, 3), (32, 32, 32, 4, 3))


@triton.jit
def dot(a, b, acc, WIDEN: tl.constexpr):
    """Return a @ b + acc in float32, without rounding float32 operands to tf32."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision='ieee')


@triton.jit
def block_of(N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the rows and the columns, of N, that this program computes of the result."""
    COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    row_M = tl.program_id(0) // COLUMNS * BLOCK_M + tl.arange(0, BLOCK_M)
    return row_M, tl.program_id(0) % COLUMNS * BLOCK_N + tl.arange(0, BLOCK_N)


INTERPRETED = not isinstance(dot, triton.JITFunction)


def tuned(kernel: Callable, key: list[str], more_half_blocks: tuple = ()) -> Callable:
    """Choose a kernel's blocks by timing, once for each value of the arguments in ``key``.

    Args:
        kernel: Has the arguments BLOCK_M, BLOCK_N, BLOCK_K and weight_ptr, of the dtype of its
            products.
        key: Names of arguments; dtypes count by themselves.
        more_half_blocks: Blocks to try beside ``HALF_BLOCKS``. Defaults to none.
    """
    if INTERPRETED:
        return triton.autotune([_config(16, 32, 16, 1, 1)], key)(kernel)
    half = [_config(*blocks) for blocks in more_half_blocks + HALF_BLOCKS]
    full = [_config(*blocks) for blocks in FLOAT_BLOCKS]

    def fitting(configs: list, arguments: dict, **kwargs: object) -> list:
        return full if arguments['weight_ptr'].dtype == torch.float32 else half

    return triton.autotune(half + full, key, prune_configs_by={'early_config_prune': fitting})(
        kernel
    )


def size_class(rows: int) -> int:
    """Return the power of two that ``rows`` fits in: counts that differ little share a tuning."""
    return (rows - 1).bit_length()


def grid_of(rows: int, columns: int) -> Callable[[dict], tuple[int]]:
    """Return the launch grid: one program for each block of the result."""
    return lambda meta: (
        triton.cdiv(rows, meta['BLOCK_M']) * triton.cdiv(columns, meta['BLOCK_N']),
    )


def widen(x: Tensor) -> bool:
    """Whether products of this dtype have to be widened by hand."""
    return INTERPRETED and x.dtype == torch.bfloat16


def check_launch(op: str, tensors: list[Tensor]) -> None:
    """Raise an error if a tensor is not on a CUDA device or needs a gradient."""
    for tensor in tensors:
        if not (tensor.is_cuda or INTERPRETED):
            raise ValueError(
                f'{op} takes tensors on a CUDA device, got one on {tensor.device}; use execution '
                "'gather' there"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f'{op} has no backward pass, and an input requires a gradient; call it under '
                "torch.no_grad() or use execution 'gather'"
            )


def _config(m: int, n: int, k: int, warps: int, stages: int) -> triton.Config:
    return triton.Config(dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k), num_warps=warps, num_stages=stages)
