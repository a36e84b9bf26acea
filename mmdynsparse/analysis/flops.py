"""Multiply-adds of one real forward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_macs(model_or_fn: nn.Module | Callable, *inputs: object) -> int:
    """Count the multiply-adds of matrix products, convolutions and attention in one call.

    The call is really executed, without gradients, so a sparse model is charged for the locations
    it computes for this input, its predictors included. Normalisation, activations, indexing and
    operators of compiled extensions (RoIAlign, NMS) count as nothing. A module runs in eval mode
    and is given back in the modes it had; a function runs as it is.

    Args:
        model_or_fn: Module or function to call.
        *inputs: Arguments of the call.

    Returns:
        Number of multiply-adds (1e9 of them are one GMAC).
    """
    modules = list(model_or_fn.modules()) if isinstance(model_or_fn, nn.Module) else []
    modes = [module.training for module in modules]
    counter = FlopCounterMode(display=False)
    try:
        for module in modules:
            module.training = False
        with torch.no_grad(), plain_attention(), counter:
            model_or_fn(*inputs)
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
    return counter.get_total_flops() // 2


@contextmanager
def plain_attention() -> Iterator[None]:
    """Run attention as matrix products: torch counts nothing for some of its fused forms."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
