"""Fused Triton kernels for the sparse ops, for inference on CUDA devices.

``execution = 'triton'`` uses them. Triton (3.0 or later, as it comes with torch 2.4) is imported
only then. The kernels have no backward pass and refuse an input that needs one: training computes
both paths everywhere. They never wait for the device, so that a CUDA graph can capture them. The
first call for a new size tunes the blocks, and that does wait: call once before capturing.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

from .arguments import LinearWeights, MlpWeights

__all__ = ['LinearWeights', 'MlpWeights', 'get_kernel']

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
