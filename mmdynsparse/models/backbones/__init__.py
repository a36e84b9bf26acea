"""Sparse backbones, one family a file."""

from .convnext import SparseConvNeXt
from .lvvit import SparseLVViT
from .resnet import SparseResNet, SparseResNetV1c, SparseResNetV1d
from .sparse_backbone import SparseBackbone
from .swin import SparseSwinTransformer
from .vit import SparseVisionTransformer

__all__ = [
    'SparseBackbone',
    'SparseConvNeXt',
    'SparseLVViT',
    'SparseResNet',
    'SparseResNetV1c',
    'SparseResNetV1d',
    'SparseSwinTransformer',
    'SparseVisionTransformer',
]
