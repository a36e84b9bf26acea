"""Hooks for mmengine's runner."""

from .distillation_hook import DistillationHook
from .schedule_hooks import FreezePretrained, KeepRatioSchedule, TemperatureSchedule
from .sparsity_hook import SparsityHook

__all__ = [
    'DistillationHook',
    'FreezePretrained',
    'KeepRatioSchedule',
    'SparsityHook',
    'TemperatureSchedule',
]
