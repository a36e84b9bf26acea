"""Linear layers in the form that is fastest on the device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import plain_float32

# oneDNN's matrix product, which torch.compile uses as well. F.linear calls the BLAS library
# instead; MKL reaches half of oneDNN's speed on AMD processors (benchmarks/README.md). None where
# torch is built without it.
_ONE_DNN = getattr(torch.ops.mkldnn, '_linear_pointwise', None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """Apply a linear layer, and a GELU if asked for.

    Inference in float32 on a CPU runs in oneDNN, everything else as ``F.linear``.

    Args:
        x: (..., C_in).
        weight: (C_out, C_in).
        bias: (C_out,) or None.
        gelu: Whether the exact (erf) GELU follows. Defaults to False.

    Returns:
        (..., C_out)
    """
    if _runs_in_one_dnn(x) and weight.numel():
        act, algorithm = ('gelu', 'none') if gelu else ('none', '')
        # On weights that are a part of others it falls back to a loop, a thousand times slower.
        return _ONE_DNN(x, weight.contiguous(), bias, act, [], algorithm)
    x = F.linear(x, weight, bias)
    return F.gelu(x) if gelu else x


def _runs_in_one_dnn(x: Tensor) -> bool:
    enabled = _ONE_DNN is not None and torch.backends.mkldnn.enabled
    return enabled and x.numel() > 0 and plain_float32(x)
