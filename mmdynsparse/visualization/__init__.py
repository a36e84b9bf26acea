"""Pictures of what a sparse model keeps."""

from .keep_maps import (
    check_drawable,
    decision_labels,
    draw_keep_maps,
    keep_map_row,
    labelled_panel,
)

__all__ = [
    'check_drawable',
    'decision_labels',
    'draw_keep_maps',
    'keep_map_row',
    'labelled_panel',
]
