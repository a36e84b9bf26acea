"""Models compiled, captured in CUDA graphs, and copied without their weights."""

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from ..models.decider import deciders

MODES = ('eager', 'compile', 'cudagraph')
# Copies of one class at several keep ratios share torch.compile's cache.
COMPILED_COPIES = 64


def with_keep_ratio(model: nn.Module, keep_ratio: float | Sequence[float] | None) -> nn.Module:
    """Return a copy of a model with other keep ratios, which shares its weights.

    Args:
        model: The model.
        keep_ratio: Of the first sparse part, which is the backbone unless only a neck or head is
            sparse: a number, continued by the schedule, or one for each predictor; None leaves
            those of the model.

    Raises:
        ValueError: If nothing in the model has a keep ratio, or it is not valid.
    """
    tensors = [*model.parameters(), *model.buffers()]
    copy = deepcopy(model, {id(tensor): tensor for tensor in tensors})
    if keep_ratio is not None:
        first = next(iter(deciders(copy).values()), None)
        if first is None:
            raise ValueError(f'keep_ratio needs a model with predictors, got {keep_ratio}')
        first.set_keep_ratio(keep_ratio)
    return copy


def forwards(modules: Sequence[nn.Module], mode: str) -> dict[nn.Module, Callable]:
    """Return what takes the place of each module's ``forward`` in one of ``MODES``.

    Args:
        modules: Modules that are functions of tensors.
        mode: 'eager', nothing; 'compile', by torch.compile for static shapes, which forgets what
            was compiled before; or 'cudagraph', captured by the first call, then replayed.
    """
    if mode == 'eager':
        return {}
    if mode == 'cudagraph':
        return {module: CudaGraph(module.forward) for module in modules}
    torch._dynamo.reset()
    torch._dynamo.config.cache_size_limit = COMPILED_COPIES
    return {module: torch.compile(module.forward, dynamic=False) for module in modules}


class CudaGraph:
    """A function of tensors that is captured by its first call and replayed by the others.

    Args:
        function: Takes a batch of images, which is copied, or a sequence of features. Those stay
            where they are if they come out of another graph; otherwise it is captured again.
    """

    warmup = 3

    def __init__(self, function: Callable) -> None:
        self.function = function
        self.graph = None

    def __call__(self, x: Tensor | Sequence[Tensor]) -> object:
        """Return the function's output, which the next call overwrites."""
        if self.graph is None or not self._fits(x):
            self._capture(x)
        if isinstance(x, Tensor):
            self.inputs.copy_(x)
        self.graph.replay()
        return self.outputs

    def _fits(self, x: Tensor | Sequence[Tensor]) -> bool:
        if isinstance(x, Tensor):
            return x.shape == self.inputs.shape
        return all(new is old for new, old in zip(x, self.inputs, strict=True))

    def _capture(self, x: Tensor | Sequence[Tensor]) -> None:
        self.inputs = x.clone() if isinstance(x, Tensor) else x
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.warmup):
                self.function(self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = self.function(self.inputs)
