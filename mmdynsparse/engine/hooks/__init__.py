"""Hooks for mmengine's runner."""

from .distillation_hook import DistillationHook
from .freeze_hook import FreezePretrained
from .joint_hook import DenseSparseSchedule
from .single_path_hook import SinglePathSearchHook
from .sparsity_hook import SparsityHook

__all__ = [
    'DenseSparseSchedule',
    'DistillationHook',
    'FreezePretrained',
    'SinglePathSearchHook',
    'SparsityHook',
]
