"""Generated data for the quickstart and for tests."""

from .scenes import CLASSES, PALETTE, THING_CLASSES, write_scenes

__all__ = ['CLASSES', 'PALETTE', 'THING_CLASSES', 'write_scenes']
