"""Checkpoints, and the command line."""

from .checkpoints import convert_checkpoint

__all__ = ['convert_checkpoint']
