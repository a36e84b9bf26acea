"""Code around the calls of a model's modules."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial, wraps

from torch import nn


@contextmanager
def around_calls(
    model: nn.Module,
    contexts: Mapping[str, Callable[[], AbstractContextManager]],
    method: str = 'forward',
) -> Iterator[None]:
    """Run a method of some of a model's modules within context managers.

    Unlike forward hooks this also sees code that calls ``module.forward`` itself, as the heads of
    mmseg do.

    Args:
        model: The model. Afterwards it is as it was.
        contexts: For the names of modules a function that makes the context manager of a call.
        method: Which method of them. Defaults to 'forward'.
    """
    modules = {name: module for name, module in model.named_modules() if name in contexts}
    # What somebody set on the instance before comes back afterwards.
    before = {name: module.__dict__.get(method) for name, module in modules.items()}
    for name, module in modules.items():
        setattr(module, method, _within(contexts[name], getattr(module, method)))
    try:
        yield
    finally:
        for name, module in modules.items():
            delattr(module, method)
            if before[name] is not None:
                setattr(module, method, before[name])


@contextmanager
def recorded_keep_rates(model: nn.Module) -> Iterator[list[float]]:
    """Record what share of the locations the predictors keep.

    Args:
        model: The model.

    Yields:
        A list that gets, at the end, the share that each predictor kept, in the order of the
        modules: the mean over all calls, of which a sliding window makes several an image.
    """
    modules = {name: module for name, module in model.named_modules() if _decides(module)}
    seen = {name: [] for name in modules}

    @contextmanager
    def record(name: str) -> Iterator[None]:
        yield
        seen[name].append([d.mask.float().mean().item() for d in modules[name].decisions])

    rates = []
    with around_calls(model, {name: partial(record, name) for name in modules}):
        yield rates
    for calls in seen.values():
        rates += [sum(column) / len(column) for column in zip(*calls, strict=True)]


def _decides(module: nn.Module) -> bool:
    return hasattr(module, 'decisions')


def _within(context: Callable[[], AbstractContextManager], function: Callable) -> Callable:
    @wraps(function)
    def call(*args, **kwargs):
        with context():
            return function(*args, **kwargs)

    return call
