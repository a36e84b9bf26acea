"""Code around the calls of a model's modules."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import wraps

from torch import nn


@contextmanager
def around_calls(
    model: nn.Module, contexts: Mapping[str, Callable[[], AbstractContextManager]]
) -> Iterator[None]:
    """Run the ``forward`` of some of a model's modules within context managers.

    Unlike forward hooks this also sees code that calls ``module.forward`` itself, as the heads of
    mmseg do.

    Args:
        model: The model. Afterwards it is as it was.
        contexts: For the names of modules a function that makes the context manager of a call.
    """
    modules = {name: module for name, module in model.named_modules() if name in contexts}
    # A forward that somebody set on the instance before comes back afterwards.
    before = {name: module.__dict__.get('forward') for name, module in modules.items()}
    for name, module in modules.items():
        module.forward = _within(contexts[name], module.forward)
    try:
        yield
    finally:
        for name, module in modules.items():
            del module.forward
            if before[name] is not None:
                module.forward = before[name]


def _within(context: Callable[[], AbstractContextManager], forward: Callable) -> Callable:
    @wraps(forward)
    def call(*args, **kwargs):
        with context():
            return forward(*args, **kwargs)

    return call
