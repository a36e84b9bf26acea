"""Modules built on ``mmdynsparse.ops``, shared by all backbones."""

from .fast_path import LinearFastPath
from .norm import LayerNorm2d
from .patch import PatchEmbed, PatchMerging
from .predictor import LocalGlobalPredictor
from .token_attention import TokenMSA
from .window_attention import ShiftWindowMSA, WindowMSA

__all__ = [
    'LayerNorm2d',
    'LinearFastPath',
    'LocalGlobalPredictor',
    'PatchEmbed',
    'PatchMerging',
    'ShiftWindowMSA',
    'TokenMSA',
    'WindowMSA',
]
