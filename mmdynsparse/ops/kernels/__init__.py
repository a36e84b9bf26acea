"""Fused forms of the sparse ops, chosen by name.

Every op has a ``torch`` form, the default, which runs everywhere and defines what the op means,
and a ``triton`` form for CUDA devices. Triton (3.0 or later, as it comes with torch 2.4) is
imported only when its form is asked for.

The Triton forms are for inference: training runs masked, with both paths everywhere, so they
have no backward pass and refuse an input that needs one. They never wait for the device, so that
a CUDA graph can capture them. The first call for a new size tunes the blocks, and that does wait:
call once before capturing.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

from .arguments import LinearWeights, MlpWeights

__all__ = ['KERNELS', 'LinearWeights', 'MlpWeights', 'get_kernel']

# Op to form to the module that holds the function of the op's name.
KERNELS: dict[str, dict[str, str]] = {
    'sparse_mlp': {'torch': 'torch_forms', 'triton': 'triton_mlp'},
    'cell_conv': {'torch': 'torch_forms', 'triton': 'triton_conv'},
}


def get_kernel(op: str, name: str = 'torch') -> Callable:
    """Return one form of an op; all forms of an op take the same arguments.

    Args:
        op: A name in ``KERNELS``.
        name: 'torch' or 'triton'. Defaults to 'torch'.

    Raises:
        ValueError: ``op`` or ``name`` is unknown.
        RuntimeError: ``name`` is 'triton' and Triton is not installed.
    """
    if op not in KERNELS:
        raise ValueError(f'op must be one of {sorted(KERNELS)}, got {op!r}')
    if name not in KERNELS[op]:
        raise ValueError(f'name must be one of {sorted(KERNELS[op])} for {op}, got {name!r}')
    if name == 'triton' and find_spec('triton') is None:
        raise RuntimeError(
            f"the 'triton' form of {op} needs Triton, which is not installed; use 'torch'"
        )
    return getattr(import_module(f'.{KERNELS[op][name]}', __name__), op)
