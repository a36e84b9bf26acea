"""Modules built on ``mmdynsparse.ops``, shared by all backbones."""

from .bottleneck_conv import BottleneckConv, ConvRows
from .conv_norm import can_fold, conv_norm, fold_norm
from .fast_path import LinearFastPath, LowRankFastPath
from .linear import FFN, Linear, apply_linear, linear_act, mlp_weights
from .norm import LayerNorm2d
from .patch import ConvPatchEmbed, PatchEmbed, PatchMerging
from .plain import check_plain, is_plain
from .predictor import AttentionScore, CellPredictor, LocalGlobalPredictor, MagnitudeScore
from .single_path import GatedFFN, SinglePathMixer, SinglePathTokenMSA, SinglePathWindowMSA
from .token_attention import TokenMSA, received_attention
from .window_attention import ShiftWindowMSA, WindowMSA
