"""Dynamic spatial sparsification for OpenMMLab segmentors and detectors."""

from .models.budgets import set_budget
from .version import __version__

__all__ = ['__version__', 'set_budget']
