"""What exists only while a model is trained or tested."""

from .hooks import (
    DistillationHook,
    FreezePretrained,
    KeepRatioSchedule,
    SparsityHook,
    TemperatureSchedule,
)
from .parameters import FineTuneOptimWrapperConstructor

__all__ = [
    'DistillationHook',
    'FineTuneOptimWrapperConstructor',
    'FreezePretrained',
    'KeepRatioSchedule',
    'SparsityHook',
    'TemperatureSchedule',
]
