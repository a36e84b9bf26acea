"""Pictures of what a sparse model keeps."""

from .keep_maps import decision_labels, draw_keep_maps, keep_map_row, labelled_panel

__all__ = ['decision_labels', 'draw_keep_maps', 'keep_map_row', 'labelled_panel']
