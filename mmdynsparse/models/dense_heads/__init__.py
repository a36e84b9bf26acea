"""Sparse dense heads of mmdetection, which has to be installed."""

from .one_stage import SparseATSSHead, SparseFCOSHead, SparseGFLHead, SparseRetinaHead
from .sparse_rpn_head import SparseRPNHead

__all__ = [
    'SparseATSSHead',
    'SparseFCOSHead',
    'SparseGFLHead',
    'SparseRPNHead',
    'SparseRetinaHead',
]
