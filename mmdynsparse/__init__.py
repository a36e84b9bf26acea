"""Dynamic spatial sparsification for OpenMMLab segmentors and detectors."""

from .version import __version__

__all__ = ['__version__']
