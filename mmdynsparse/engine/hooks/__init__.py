"""Hooks for mmengine's runner."""

from .distillation_hook import DistillationHook
from .freeze_hook import FreezePretrained
from .sparsity_hook import SparsityHook

__all__ = ['DistillationHook', 'FreezePretrained', 'SparsityHook']
