"""Modules built on ``mmdynsparse.ops``, shared by all backbones."""

from .fast_path import LinearFastPath
from .patch import PatchEmbed, PatchMerging
from .predictor import LocalGlobalPredictor
from .window_attention import ShiftWindowMSA, WindowMSA

__all__ = [
    'LinearFastPath',
    'LocalGlobalPredictor',
    'PatchEmbed',
    'PatchMerging',
    'ShiftWindowMSA',
    'WindowMSA',
]
