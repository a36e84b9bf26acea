"""Modules built on ``mmdynsparse.ops``, shared by all backbones."""

from .conv_norm import conv_norm
from .fast_path import LinearFastPath, LowRankFastPath
from .norm import LayerNorm2d
from .patch import PatchEmbed, PatchMerging
from .predictor import CellPredictor, LocalGlobalPredictor
from .token_attention import TokenMSA
from .window_attention import ShiftWindowMSA, WindowMSA

__all__ = [
    'CellPredictor',
    'LayerNorm2d',
    'LinearFastPath',
    'LocalGlobalPredictor',
    'LowRankFastPath',
    'PatchEmbed',
    'PatchMerging',
    'ShiftWindowMSA',
    'TokenMSA',
    'WindowMSA',
    'conv_norm',
]
