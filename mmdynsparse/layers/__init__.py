"""Modules built on ``mmdynsparse.ops``, shared by all backbones."""

from .conv_norm import conv_norm, fold_norm
from .fast_path import LinearFastPath, LowRankFastPath
from .linear import FFN, Linear, linear_act, mlp_weights
from .norm import LayerNorm2d
from .patch import PatchEmbed, PatchMerging
from .predictor import CellPredictor, LocalGlobalPredictor
from .token_attention import TokenMSA
from .window_attention import ShiftWindowMSA, WindowMSA

__all__ = [
    'FFN',
    'CellPredictor',
    'LayerNorm2d',
    'Linear',
    'LinearFastPath',
    'LocalGlobalPredictor',
    'LowRankFastPath',
    'PatchEmbed',
    'PatchMerging',
    'ShiftWindowMSA',
    'TokenMSA',
    'WindowMSA',
    'conv_norm',
    'fold_norm',
    'linear_act',
    'mlp_weights',
]
