"""A sparse config from a dense one."""

from .build import Draft, draft_config
from .counterparts import PARTS, TABLE, Part, swap_parts
from .measure import Measured, measure

__all__ = [
    'PARTS',
    'TABLE',
    'Draft',
    'Measured',
    'Part',
    'draft_config',
    'measure',
    'swap_parts',
]
