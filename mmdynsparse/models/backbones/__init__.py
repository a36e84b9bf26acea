"""Sparse backbones, one family a file."""

from .convnext import SparseConvNeXt
from .resnet import SparseResNet, SparseResNetV1c, SparseResNetV1d
from .sparse_backbone import SparseBackbone
from .swin import SparseSwinTransformer
from .vit import SparseVisionTransformer

__all__ = [
    'SparseBackbone',
    'SparseConvNeXt',
    'SparseResNet',
    'SparseResNetV1c',
    'SparseResNetV1d',
    'SparseSwinTransformer',
    'SparseVisionTransformer',
]
