"""What exists only while a model is trained or tested."""

from .hooks import (
    DenseSparseSchedule,
    DistillationHook,
    FreezePretrained,
    KeepMapHook,
    SafeCheckpointHook,
    SinglePathSearchHook,
    SparsityHook,
)
from .loops import MultiBudgetTestLoop, MultiBudgetValLoop
from .parameters import FineTuneOptimWrapperConstructor
from .strategy import FSDPStrategy

__all__ = [
    'DenseSparseSchedule',
    'DistillationHook',
    'FSDPStrategy',
    'FineTuneOptimWrapperConstructor',
    'FreezePretrained',
    'KeepMapHook',
    'MultiBudgetTestLoop',
    'MultiBudgetValLoop',
    'SafeCheckpointHook',
    'SinglePathSearchHook',
    'SparsityHook',
]
