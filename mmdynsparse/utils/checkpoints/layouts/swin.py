"""Names of Swin in other code bases.

The original Swin repository (microsoft/Swin-Transformer), timm and the published DynamicSwin
(raoyongming/DynamicViT) share their names but for the place of the merging. Their merging
concatenates neighbours with rows fastest and channels innermost, OpenMMLab's with channels
outermost and columns fastest, so its weights are reordered.
"""

import re
from collections import OrderedDict

from torch import Tensor

from ....ops import relative_position_index
from .common import StateDict, add_output_norms, predictor_renames, rename, rename_all

RENAMES = (
    (r'^patch_embed\.proj\.', 'patch_embed.projection.'),
    (r'^layers\.', 'stages.'),
    (r'\.attn\.', '.attn.w_msa.'),
    (r'\.mlp\.fc1\.', '.ffn.layers.0.0.'),
    (r'\.mlp\.fc2\.', '.ffn.layers.1.'),
    (r'\.fastmlp\.fc1\.0\.', '.fast_path.norm.'),
    (r'\.fastmlp\.fc1\.1\.', '.fast_path.fc.'),
    *predictor_renames(r'\.score_predictor', '.predictors'),
)
# Classifier weights and tensors that follow from the window size.
DROPPED = re.compile(r'^head\.|\.attn_mask$|\.relative_position_index$')


def from_openmmlab(tensors: StateDict) -> StateDict:
    """Drop what OpenMMLab's own converters leave behind of a classification model."""
    out = rename_all(tensors, re.compile(rf'^norm\.|{DROPPED.pattern}'))
    _add_window_index(out)
    out._metadata = tensors._metadata
    return out


def from_original(tensors: StateDict) -> StateDict:
    """Convert the names of the original Swin, of timm's and of the published DynamicSwin."""
    # timm >= 0.9 puts the merging at the start of a stage, the others at the end of the one before.
    early = any(k.startswith('layers.0.downsample.') for k in tensors)
    out = OrderedDict()
    for name, value in tensors.items():
        if DROPPED.search(name):
            continue
        if '.downsample.' in name:
            value = _channels_first(value)
            if not early:
                name = re.sub(r'\d+', lambda m: str(int(m[0]) - 1), name, count=1)
        out[rename(name, RENAMES)] = value
    _add_window_index(out)
    add_output_norms(out, r'stages\.\d+\.blocks\.0\.norm1\.weight')
    out._metadata = OrderedDict({'': {'version': 1, 'shift_small_maps': False}})
    return out


def _channels_first(value: Tensor) -> Tensor:
    """Reorder merging weights (..., 4 C): neighbours 00, 10, 01, 11 outermost to innermost."""
    parts = value.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :]
    return parts.transpose(-1, -2).flatten(-2)


def _add_window_index(out: dict[str, Tensor]) -> None:
    for name in [k for k in out if k.endswith('.relative_position_bias_table')]:
        window_size = (int(out[name].shape[0] ** 0.5) + 1) // 2
        out[name.replace('bias_table', 'index')] = relative_position_index(window_size)
