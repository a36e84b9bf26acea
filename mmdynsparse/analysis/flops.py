"""Multiply-adds of real forward passes, of a whole call or by module."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakTensorKeyDictionary

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

    Multiply-adds are counted as by ``count_macs``. Those with a module's weights, or with what is
    made of these alone, are charged to that module, whoever computes them: a sparse part often
    reads the weights of its layers. All others are charged to the module that runs. So the modules
    add up to the whole.

    Args:
        model: The model, in eval mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.calls = 0
        self._macs = Counter()
        self._used: set[int] = set()
        self._running = ['']

    def run(self, function: Callable[[], object]) -> None:
        """Call a function that runs the model, without gradients."""
        counter = FlopCounterMode(display=False)
        contexts = {
            name: partial(self._charged, name, module)
            for name, module in self.model.named_modules()
            if name
        }
        weights = _Weights(self.model)
        operators = _Operators(weights, counter, self._charge)
        modules = around_calls(self.model, contexts)
        with torch.no_grad(), plain_attention(), modules, counter, operators:
            function()
        self._used |= weights.used
        self.calls += 1

    def cost(self, name: str = '') -> Cost:
        """Return the cost of a module by its name; the default is the whole model."""
        inside = [n for n in self._macs if not name or n == name or n.startswith(f'{name}.')]
        module = self.model.get_submodule(name)
        params = sum(p.numel() for p in module.parameters() if id(p) in self._used)
        return Cost(sum(self._macs[n] for n in inside) / max(self.calls, 1), params)

    @contextmanager
    def _charged(self, name: str, module: nn.Module) -> Iterator[None]:
        # Some modules give their parameters to compiled extensions, which no operator shows.
        self._used.update(id(p) for p in module.parameters(recurse=False))
        self._running.append(name)
        try:
            yield
        finally:
            self._running.pop()

    def _charge(self, macs: int, owner: str | None) -> None:
        self._macs[self._running[-1] if owner is None else owner] += macs


class _Weights:
    """Knows which module owns a parameter, a buffer or a tensor that is made of these alone.

    Attributes:
        used: Ids of the parameters that an operator took.
    """

    def __init__(self, model: nn.Module) -> None:
        self._owners = WeakTensorKeyDictionary()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._owners[tensor] = name.rpartition('.')[0]
        self.used: set[int] = set()

    def owner(self, leaves: Sequence[Tensor]) -> str | None:
        """Return the owner of the weight among the inputs of an operator."""
        self.used.update(id(leaf) for leaf in leaves if isinstance(leaf, nn.Parameter))
        return next((self._owners[x] for x in leaves if x.ndim > 1 and x in self._owners), None)

    def derive(self, leaves: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Remember the outputs of an operator that took weights alone, as of the first one."""
        if leaves and all(x in self._owners for x in leaves):
            for output in outputs:
                self._owners.setdefault(output, self._owners[leaves[0]])


class _Operators(TorchDispatchMode):
    """Tells how many multiply-adds each operator takes, and who owns its weight."""

    def __init__(
        self,
        weights: _Weights,
        counter: FlopCounterMode,
        charge: Callable[[int, str | None], None],
    ) -> None:
        super().__init__()
        self.weights, self.counter, self.charge = weights, counter, charge

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        owner = self.weights.owner(leaves)
        before = self.counter.get_total_flops()
        outputs = func(*args, **(kwargs or {}))
        if macs := (self.counter.get_total_flops() - before) // 2:
            self.charge(macs, owner)
        self.weights.derive(leaves, [x for x in tree_leaves(outputs) if isinstance(x, Tensor)])
        return outputs
