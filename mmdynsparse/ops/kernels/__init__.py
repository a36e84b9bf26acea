"""Fused Triton kernels for the sparse ops, for inference on CUDA devices.

``execution = 'triton'`` uses them. Triton (3.0 or later, as it comes with torch 2.4) is imported
only then. The kernels have no backward pass and refuse an input that needs one: training computes
both paths everywhere. They never wait for the device, so that a CUDA graph can capture them. The
first call for a new size tunes the blocks, and that does wait: call once before capturing.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from .arguments import LinearWeights, MlpWeights

__all__ = ['LinearWeights', 'MlpWeights', 'fused_paths', 'get_kernel']

# The module of each kernel, which has its name.
_MODULES = {'sparse_mlp': 'triton_mlp', 'cell_conv': 'triton_conv'}


def get_kernel(name: str) -> Callable:
    """Import a kernel.

    Args:
        name: 'sparse_mlp' or 'cell_conv'.

    Raises:
        ValueError: If there is no kernel of this name.
        RuntimeError: If Triton is not installed.
    """
    if name not in _MODULES:
        raise ValueError(f'name must be one of {sorted(_MODULES)}, got {name!r}')
    if find_spec('triton') is None:
        raise RuntimeError(
            f"{name} needs Triton, which is not installed; use execution 'gather' without it"
        )
    return getattr(import_module(f'.{_MODULES[name]}', __name__), name)


def fused_paths(
    x_PC: Tensor,
    residual_PC: Tensor,
    kept_K: Tensor,
    dropped_M: Tensor,
    slow: MlpWeights,
    fast_path: object | None,
) -> Tensor:
    """Run ``sparse_mlp`` on a module as fast path; under autocast its products are in that dtype.

    Raises:
        ValueError: If the fast path is not None and has no method ``weights`` for the kernel.
    """
    if fast_path is not None and not hasattr(fast_path, 'weights'):
        raise ValueError(
            "the fast path must be LinearFastPath or None with execution 'triton', "
            f'got {type(fast_path).__name__}'
        )
    fast = None if fast_path is None else fast_path.weights()
    if torch.is_autocast_enabled(x_PC.device.type):
        dtype = torch.get_autocast_dtype(x_PC.device.type)
        slow = slow._replace(weight1=slow.weight1.to(dtype), weight2=slow.weight2.to(dtype))
        fast = fast and fast._replace(weight=fast.weight.to(dtype))
    if slow.gamma is not None:  # its dtype makes the sum float32, as in torch
        residual_PC = residual_PC.to(torch.promote_types(residual_PC.dtype, slow.gamma.dtype))
    return get_kernel('sparse_mlp')(x_PC, residual_PC, kept_K, dropped_M, slow, fast)
