"""Names of ConvNeXt in other code bases.

mmpretrain's are ours. The original repository (facebookresearch/ConvNeXt) and the published
DynamicCNN (raoyongming/DynamicViT), which adds to them, and timm's are renamed.
"""

import re

from .common import StateDict, add_output_norms, predictor_renames, rename_all

DROPPED = re.compile(r'^head\.')
ORIGINAL = (
    (r'\.dwconv\.', '.depthwise_conv.'),
    (r'\.pwconv(\d)\.', r'.pointwise_conv\1.'),
    (r'\.fast_path\.0\.', '.fast_path.norm.'),
    (r'\.fast_path\.1\.', '.fast_path.fc.'),
    (r'\.fast_path_gamma$', '.fast_path.gamma'),
    *predictor_renames('^score_predictor', 'predictors'),
)
TIMM = (
    (r'^stem\.', 'downsample_layers.0.'),
    (r'^stages\.(\d+)\.downsample\.', r'downsample_layers.\1.'),
    (r'^stages\.(\d+)\.blocks\.', r'stages.\1.'),
    (r'\.conv_dw\.', '.depthwise_conv.'),
    (r'\.mlp\.fc(\d)\.', r'.pointwise_conv\1.'),
    (r'^head\.norm\.', 'norm.'),
)


def from_openmmlab(tensors: StateDict) -> StateDict:
    """Drop the classifier."""
    return rename_all(tensors, DROPPED)


def from_original(tensors: StateDict) -> StateDict:
    """Convert the names of the original ConvNeXt and of the published DynamicCNN."""
    return _convert(tensors, ORIGINAL)


def from_timm(tensors: StateDict) -> StateDict:
    """Convert timm's names."""
    return _convert(tensors, TIMM)


def _convert(tensors: StateDict, renames: tuple) -> StateDict:
    out = rename_all(tensors, DROPPED, renames)
    for name in [k for k in out if k.startswith('predictors.')]:
        # Their predictors are 1 x 1 convolutions.
        out[name] = out[name].flatten(1) if out[name].ndim == 4 else out[name]
    add_output_norms(out, r'stages\.\d+\.0\.norm\.weight')
    return out
