"""Sparse decode heads of mmsegmentation, which has to be installed."""

from .sparse_uper_head import SparseUPerHead

__all__ = ['SparseUPerHead']
