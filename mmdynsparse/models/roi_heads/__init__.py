"""Sparse RoI heads of mmdetection, which has to be installed."""

from .sparse_fcn_mask_head import SparseFCNMaskHead
from .sparse_roi_heads import SparseCascadeRoIHead, SparseStandardRoIHead

__all__ = ['SparseCascadeRoIHead', 'SparseFCNMaskHead', 'SparseStandardRoIHead']
