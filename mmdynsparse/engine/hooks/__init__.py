"""Hooks for mmengine's runner."""

from .sparsity_hook import SparsityHook

__all__ = ['SparsityHook']
