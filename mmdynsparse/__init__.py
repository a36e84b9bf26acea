"""Dynamic spatial sparsification for OpenMMLab segmentors and detectors."""

from .version import __version__

__all__ = ['__version__', 'set_budget']


def __getattr__(name: str) -> object:
    """Import ``set_budget`` when it is asked for: ``mmdynsparse.deployment`` needs no torch."""
    if name == 'set_budget':
        from .models.budgets import set_budget

        return set_budget
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
