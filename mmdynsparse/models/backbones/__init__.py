"""Sparse backbones, one family a file."""

from .sparse_backbone import SparseBackbone
from .swin import SparseSwinTransformer

__all__ = ['SparseBackbone', 'SparseSwinTransformer']
