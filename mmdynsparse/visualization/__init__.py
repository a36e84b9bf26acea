"""Pictures of what a sparse model keeps."""

from .keep_maps import draw_keep_maps

__all__ = ['draw_keep_maps']
