"""Sparse necks of mmdetection, which has to be installed."""

from .sparse_fpn import SparseFPN

__all__ = ['SparseFPN']
