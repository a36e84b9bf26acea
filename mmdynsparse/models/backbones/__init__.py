"""Sparse backbones, one family a file."""

from .convnext import SparseConvNeXt
from .sparse_backbone import SparseBackbone
from .swin import SparseSwinTransformer
from .vit import SparseVisionTransformer

__all__ = ['SparseBackbone', 'SparseConvNeXt', 'SparseSwinTransformer', 'SparseVisionTransformer']
