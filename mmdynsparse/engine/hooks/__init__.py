"""Hooks for mmengine's runner."""

from .schedule_hooks import FreezePretrained, KeepRatioSchedule, TemperatureSchedule
from .sparsity_hook import SparsityHook

__all__ = ['FreezePretrained', 'KeepRatioSchedule', 'SparsityHook', 'TemperatureSchedule']
