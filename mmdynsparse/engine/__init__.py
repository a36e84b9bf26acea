"""What exists only while a model is trained or tested."""

from .hooks import (
    DenseSparseSchedule,
    DistillationHook,
    FreezePretrained,
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
    'MultiBudgetTestLoop',
    'MultiBudgetValLoop',
    'SinglePathSearchHook',
    'SparsityHook',
]
