"""What exists only while a model is trained or tested."""

from .hooks import SparsityHook

__all__ = ['SparsityHook']
