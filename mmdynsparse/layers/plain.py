"""Modules whose parameters may be read without calling them.

Reading is faster, because layers can be fused, but it skips what was put around a module: adapters,
hooks, wrappers. Where there is something like that the module is called instead.
"""

from torch import nn


def is_plain(module: nn.Module, *types: type[nn.Module]) -> bool:
    """Whether a call of the module does nothing but the forward of one of these types.

    Args:
        module: Any module.
        types: Subclasses do not count: adapters are such, and so are parametrized modules.
    """
    state = module.__dict__
    hooks = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')
    # What only surrounds a call, as a meter of multiply-adds does, says so (``models.calls``).
    own = 'forward' not in state or getattr(state['forward'], 'surrounds', False)
    return type(module) in types and own and not any(state[name] for name in hooks)


def check_plain(name: str, module: nn.Module, *types: type[nn.Module]) -> None:
    """Check that a kernel may read the parameters of a module.

    Raises:
        ValueError: If the module is not plain; the message calls it ``name``.
    """
    if not is_plain(module, *types):
        raise ValueError(
            f'{name} must be {types[0].__name__} for fused kernels, without hooks or adapters, '
            f'got {module}'
        )
