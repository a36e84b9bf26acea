"""Hooks for mmengine's runner."""

from .checkpoint_hook import SafeCheckpointHook
from .distillation_hook import DistillationHook
from .freeze_hook import FreezePretrained
from .joint_hook import DenseSparseSchedule
from .keep_map_hook import KeepMapHook
from .single_path_hook import SinglePathSearchHook
from .sparsity_hook import SparsityHook

__all__ = [
    'DenseSparseSchedule',
    'DistillationHook',
    'FreezePretrained',
    'KeepMapHook',
    'SafeCheckpointHook',
    'SinglePathSearchHook',
    'SparsityHook',
]
