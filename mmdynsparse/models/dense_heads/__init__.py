"""Sparse dense heads of mmdetection, which has to be installed."""

from .sparse_rpn_head import SparseRPNHead

__all__ = ['SparseRPNHead']
