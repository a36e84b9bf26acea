"""Model parts that OpenMMLab's registries build."""

from .backbones import SparseSwinTransformer

__all__ = ['SparseSwinTransformer']
