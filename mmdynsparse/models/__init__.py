"""Model parts that OpenMMLab's registries build."""

from .backbones import SparseConvNeXt, SparseSwinTransformer, SparseVisionTransformer

__all__ = ['SparseConvNeXt', 'SparseSwinTransformer', 'SparseVisionTransformer']
