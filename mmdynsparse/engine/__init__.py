"""What exists only while a model is trained or tested."""

from .hooks import FreezePretrained, KeepRatioSchedule, SparsityHook, TemperatureSchedule
from .parameters import FineTuneOptimWrapperConstructor

__all__ = [
    'FineTuneOptimWrapperConstructor',
    'FreezePretrained',
    'KeepRatioSchedule',
    'SparsityHook',
    'TemperatureSchedule',
]
