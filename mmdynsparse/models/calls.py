"""Calls of a model's modules: recorded, surrounded by code, or made by other functions.

A method is replaced on the instance, and only until a context ends. Unlike a forward hook this
also sees code that calls ``module.forward`` itself, as the heads of mmseg do.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import NamedTuple

from torch import nn


class Call(NamedTuple):
    """A call of a module: its name, the positional arguments and the output."""

    name: str
    args: tuple
    out: object


@contextmanager
def replaced_methods(
    functions: Mapping[nn.Module, Callable], method: str = 'forward'
) -> Iterator[None]:
    """Run other functions in place of a method of modules.

    Args:
        functions: What takes the place of each module's method. Afterwards the modules are as
            they were, with what somebody had set on the instance.
        method: Name of the method. Defaults to 'forward'.
    """
    before = {m: vars(m)[method] for m in functions if method in vars(m)}
    try:
        for module, function in functions.items():
            vars(module)[method] = function
        yield
    finally:
        for module in functions:
            vars(module).pop(method, None)
            if module in before:
                vars(module)[method] = before[module]


@contextmanager
def around_calls(
    model: nn.Module,
    contexts: Mapping[str, Callable[[], AbstractContextManager]],
    method: str = 'forward',
) -> Iterator[None]:
    """Run a method of some of a model's modules within context managers.

    Args:
        model: The model. Afterwards it is as it was.
        contexts: For the names of modules a function that makes the context manager of a call.
        method: Which method of them. Defaults to 'forward'.
    """
    functions = {
        module: _within(contexts[name], getattr(module, method))
        for name, module in model.named_modules()
        if name in contexts
    }
    with replaced_methods(functions, method):
        yield


class CallRecorder:
    """Records the calls of modules, in order, from ``start`` to ``stop``.

    The functions that stand in for ``forward`` meanwhile are made once, so that a compiled model
    is not compiled again at every start.

    Args:
        modules: The modules by name. One with several names is recorded under each.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._names: dict[nn.Module, list[str]] = {}
        for name, module in modules.items():
            self._names.setdefault(module, []).append(name)
        self._functions = {module: self._recorded(module) for module in self._names}
        self._calls: list[Call] = []
        self._replaced = ExitStack()

    def start(self) -> None:
        """Start to record, and forget what a start without a stop has left."""
        self.stop()
        for module, function in self._functions.items():
            if function.__wrapped__ != module.forward:  # somebody has set another one
                self._functions[module] = self._recorded(module)
        self._replaced.enter_context(replaced_methods(self._functions))

    def stop(self) -> list[Call]:
        """Leave the modules as they were, and return what was recorded."""
        self._replaced.close()
        calls, self._calls = self._calls, []
        return calls

    def record(self, function: Callable[[], object]) -> list[Call]:
        """Return the calls that happen while a function runs."""
        self.start()
        try:
            function()
        finally:
            calls = self.stop()
        return calls

    def _recorded(self, module: nn.Module) -> Callable:
        names, forward = self._names[module], module.forward

        @wraps(forward)
        def call(*args, **kwargs):
            out = forward(*args, **kwargs)
            self._calls.extend([Call(name, args, out) for name in names])
            return out

        return call


def _within(context: Callable[[], AbstractContextManager], function: Callable) -> Callable:
    @wraps(function)
    def call(*args, **kwargs):
        with context():
            return function(*args, **kwargs)

    call.surrounds = True
    return call
