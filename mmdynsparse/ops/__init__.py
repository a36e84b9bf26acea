"""Pure tensor functions: selection and the layout of windows."""

from .select import (
    SELECTORS,
    Decision,
    keep_all,
    sample_decision,
    select_decision,
    with_positions,
)
from .two_paths import two_paths
from .windows import WindowLayout, head_rows, relative_position_index, shift_mask, window_layout

__all__ = [
    'SELECTORS',
    'Decision',
    'WindowLayout',
    'head_rows',
    'keep_all',
    'relative_position_index',
    'sample_decision',
    'select_decision',
    'shift_mask',
    'two_paths',
    'window_layout',
    'with_positions',
]
