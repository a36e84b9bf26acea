"""Helpers for users' scripts and the tools."""

from .checkpoint import convert_checkpoint

__all__ = ['convert_checkpoint']
