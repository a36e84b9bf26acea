"""Dynamic spatial sparsification for OpenMMLab segmentors and detectors."""

from importlib import import_module

from .version import __version__

__all__ = ['__version__', 'set_budget', 'set_keep_ratio']

# Imported when they are asked for: ``mmdynsparse.deployment`` needs no torch.
_LAZY = dict(set_budget='.models.budgets', set_keep_ratio='.models.decider')


def __getattr__(name: str) -> object:
    """Import what needs torch."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
