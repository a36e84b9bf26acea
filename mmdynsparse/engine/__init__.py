"""What exists only while a model is trained or tested."""

from .hooks import DistillationHook, FreezePretrained, SparsityHook
from .parameters import FineTuneOptimWrapperConstructor
from .strategy import FSDPStrategy

__all__ = [
    'DistillationHook',
    'FSDPStrategy',
    'FineTuneOptimWrapperConstructor',
    'FreezePretrained',
    'SparsityHook',
]
