"""Multiply-adds of real forward passes, of a whole call or by module."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..models.calls import around_calls


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
    modules = model_or_fn.modules() if isinstance(model_or_fn, nn.Module) else ()
    modes = {module: module.training for module in modules}
    counter = FlopCounterMode(display=False)
    try:
        for module in modes:
            module.training = False
        with torch.no_grad(), plain_attention(), counter:
            model_or_fn(*inputs)
    finally:
        for module, mode in modes.items():
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


class Cost(NamedTuple):
    """What a module costs, the modules within it included."""

    macs: float  # multiply-adds of one call, the mean over the calls
    params: int  # number of parameters that any call used


class CostMeter:
    """Charges the multiply-adds of calls, and the parameters they use, to a model's modules.

    Multiply-adds are counted as by ``count_macs``. What a module computes between the calls of
    its submodules is charged to the module itself, so the modules add up to the whole.

    Args:
        model: The model, in eval mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.calls = 0
        self._macs = Counter()
        self._used: set[int] = set()
        self._running = ['']
        self._seen = 0

    def run(self, function: Callable[[], object]) -> None:
        """Call a function that runs the model, without gradients."""
        counter = FlopCounterMode(display=False)
        self._seen = 0
        contexts = {
            name: partial(self._charged, name, module, counter)
            for name, module in self.model.named_modules()
            if name
        }
        with torch.no_grad(), plain_attention(), around_calls(self.model, contexts):
            with counter, _UsedParameters(self._used):
                function()
            self._charge(counter)
        self.calls += 1

    def cost(self, name: str = '') -> Cost:
        """Return the cost of a module by its name; the default is the whole model."""
        inside = [n for n in self._macs if not name or n == name or n.startswith(f'{name}.')]
        module = self.model.get_submodule(name)
        params = sum(p.numel() for p in module.parameters() if id(p) in self._used)
        return Cost(sum(self._macs[n] for n in inside) / max(self.calls, 1), params)

    @contextmanager
    def _charged(self, name: str, module: nn.Module, counter: FlopCounterMode) -> Iterator[None]:
        # Some modules lend their parameters to others, which the dispatch mode sees; some give
        # them to compiled extensions, which it does not see.
        self._used.update(id(p) for p in module.parameters(recurse=False))
        self._charge(counter)
        self._running.append(name)
        try:
            yield
        finally:
            self._charge(counter)
            self._running.pop()

    def _charge(self, counter: FlopCounterMode) -> None:
        """Charge what was counted since the last charge to the module that runs."""
        total = counter.get_total_flops() // 2
        self._macs[self._running[-1]] += total - self._seen
        self._seen = total


class _UsedParameters(TorchDispatchMode):
    """Adds the ids of the parameters that operators take to a set."""

    def __init__(self, used: set[int]) -> None:
        super().__init__()
        self.used = used

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs))
        self.used.update(id(leaf) for leaf in leaves if isinstance(leaf, nn.Parameter))
        return func(*args, **(kwargs or {}))
