"""Model parts that OpenMMLab's registries build."""

from .backbones import (
    SparseConvNeXt,
    SparseResNet,
    SparseResNetV1c,
    SparseResNetV1d,
    SparseSwinTransformer,
    SparseVisionTransformer,
)

__all__ = [
    'SparseConvNeXt',
    'SparseResNet',
    'SparseResNetV1c',
    'SparseResNetV1d',
    'SparseSwinTransformer',
    'SparseVisionTransformer',
]
