"""Checkpoints of other layouts for our backbones.

Layouts handled: OpenMMLab's Swin (mmseg, mmdet), the original Swin repository
(microsoft/Swin-Transformer), timm's Swin, and the published DynamicSwin
(raoyongming/DynamicViT). The channel order of patch merging differs between the original layouts
(rows fastest among the four neighbours, channels last) and OpenMMLab's (channels first, columns
fastest), so its weights are reordered.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from ..ops import relative_position_index
from .input_checks import check_checkpoint

StateDict = Mapping[str, Tensor]

SWIN_RENAMES = (
    (r'^patch_embed\.proj\.', 'patch_embed.projection.'),
    (r'^layers\.', 'stages.'),
    (r'\.attn\.', '.attn.w_msa.'),
    (r'\.mlp\.fc1\.', '.ffn.layers.0.0.'),
    (r'\.mlp\.fc2\.', '.ffn.layers.1.'),
    (r'\.fastmlp\.fc1\.0\.', '.fast_path.norm.'),
    (r'\.fastmlp\.fc1\.1\.', '.fast_path.fc.'),
    (r'\.score_predictor\.(\d+)\.in_conv\.0\.', r'.predictors.\1.norm.'),
    (r'\.score_predictor\.(\d+)\.in_conv\.1\.', r'.predictors.\1.fc_in.'),
    (r'\.score_predictor\.(\d+)\.out_conv\.0\.', r'.predictors.\1.fc1.'),
    (r'\.score_predictor\.(\d+)\.out_conv\.2\.', r'.predictors.\1.fc2.'),
    (r'\.score_predictor\.(\d+)\.out_conv\.4\.', r'.predictors.\1.fc3.'),
)
# Classifier weights and tensors that follow from the window size.
SWIN_DROPPED = re.compile(r'^head\.|\.attn_mask$|\.relative_position_index$')


def convert_checkpoint(state_dict: Mapping, source: str) -> StateDict:
    """Convert a checkpoint to the layout of our backbones.

    Args:
        state_dict: Tensors by name, or a checkpoint that holds them under 'state_dict' or
            'model'.
        source: Where it comes from: 'mmseg' or 'mmdet' (a whole model or a backbone), 'swin' (the
            original Swin repository), 'timm', or 'dynamicvit' (the published DynamicSwin).

    Returns:
        The backbone's state dict. Classification layouts have a norm after the last stage only;
        those of the other stages start as identity. Their models do not shift windows on a map
        that fits into one window; the state dict's metadata says so to the backbone that loads it.

    Raises:
        ValueError: If the source is unknown or the names are not those of its layout.
    """
    if source not in CONVERTERS:
        raise ValueError(f'source must be one of {tuple(CONVERTERS)}, got {source!r}')
    for wrapper in ('state_dict', 'model'):
        state_dict = state_dict.get(wrapper, state_dict)
    tensors = OrderedDict((re.sub(r'^module\.', '', k), v) for k, v in state_dict.items())
    tensors._metadata = getattr(state_dict, '_metadata', OrderedDict())
    return CONVERTERS[source](tensors, source)


def load_pretrained(
    backbone: nn.Module, filename: str, source: str, optional: Callable[[str], bool]
) -> None:
    """Load a checkpoint into a backbone whose new parameters it may lack.

    Args:
        backbone: The module to load into.
        filename: Path or URL.
        source: As in :func:`convert_checkpoint`.
        optional: Says of a parameter's name whether the checkpoint may lack it.

    Raises:
        ValueError: If the file is missing or unreadable, or lacks or has keys it should not.
    """
    checkpoint = check_checkpoint('init_cfg.checkpoint', filename)
    # An address is not looked at by the check, but fetched here.
    checkpoint = checkpoint or CheckpointLoader.load_checkpoint(filename, 'cpu', logger=None)
    keys = backbone.load_state_dict(convert_checkpoint(checkpoint, source), strict=False)
    missing = [k for k in keys.missing_keys if not optional(k)]
    if missing or keys.unexpected_keys:
        raise ValueError(
            f'init_cfg.checkpoint {filename!r} does not fit {type(backbone).__name__}: '
            f'missing {_shorten(missing)}, unexpected {_shorten(keys.unexpected_keys)}'
        )


def resize_bias_table(table: Tensor, size: int) -> Tensor:
    """Resize a relative position bias table (L, heads) to ``size`` rows, bicubic in 2-D."""
    old, new = int(table.shape[0] ** 0.5), int(size**0.5)
    table_1HSS = table.t().reshape(1, -1, old, old)
    resized = F.interpolate(table_1HSS, size=(new, new), mode='bicubic')
    return resized.view(-1, size).t().contiguous()


def resize_pos_embed(embed_1NC: Tensor, hw: tuple[int, int], new_hw: tuple[int, int]) -> Tensor:
    """Resize a position embedding (1, H * W, C) from ``hw`` to ``new_hw`` tokens, bicubic."""
    if hw == new_hw:
        return embed_1NC
    embed_1CHW = embed_1NC.unflatten(1, hw).permute(0, 3, 1, 2)
    resized = F.interpolate(embed_1CHW, size=new_hw, mode='bicubic', align_corners=False)
    return resized.flatten(2).transpose(1, 2)


def _from_openmmlab(tensors: StateDict, source: str) -> StateDict:
    prefix = 'backbone.' if any(k.startswith('backbone.') for k in tensors) else ''
    out = OrderedDict((k[len(prefix) :], v) for k, v in tensors.items() if k.startswith(prefix))
    _require('patch_embed.projection.weight', out, source)
    # What OpenMMLab's own converters leave behind of a classification model.
    for name in [k for k in out if SWIN_DROPPED.search(k) or k.startswith('norm.')]:
        del out[name]
    _add_window_index(out)
    metadata = {k.removeprefix('module.'): v for k, v in tensors._metadata.items()}
    out._metadata = OrderedDict({'': metadata.get(prefix[:-1], {})})
    return out


def _from_swin(tensors: StateDict, source: str) -> StateDict:
    _require('layers.0.blocks.0.attn.qkv.weight', tensors, source)
    # timm >= 0.9 puts the merging at the start of a stage, the others at the end of the one before.
    early = any(k.startswith('layers.0.downsample.') for k in tensors)
    out = OrderedDict()
    for name, value in tensors.items():
        if SWIN_DROPPED.search(name):
            continue
        if '.downsample.' in name:
            value = _channels_first(value)
            if not early:
                name = re.sub(r'\d+', lambda m: str(int(m[0]) - 1), name, count=1)
        for pattern, replacement in SWIN_RENAMES:
            name = re.sub(pattern, replacement, name)
        out[name] = value
    _add_window_index(out)
    _add_output_norms(out)
    out._metadata = OrderedDict({'': {'version': 1, 'shift_small_maps': False}})
    return out


def _channels_first(value: Tensor) -> Tensor:
    """Reorder merging weights (..., 4 C): neighbours 00, 10, 01, 11 outermost to innermost."""
    parts = value.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :]
    return parts.transpose(-1, -2).flatten(-2)


def _add_window_index(out: dict[str, Tensor]) -> None:
    for name in [k for k in out if k.endswith('.relative_position_bias_table')]:
        window_size = (int(out[name].shape[0] ** 0.5) + 1) // 2
        index_name = name.replace('bias_table', 'index')
        out[index_name] = relative_position_index(window_size)


def _add_output_norms(out: dict[str, Tensor]) -> None:
    dims = [v for k, v in out.items() if re.fullmatch(r'stages\.\d+\.blocks\.0\.norm1\.weight', k)]
    last = len(dims) - 1
    for name in [k for k in out if k.startswith('norm.')]:
        out[name.replace('norm.', f'norm{last}.')] = out.pop(name)
    for i, weight in enumerate(dims[:-1]):
        out[f'norm{i}.weight'] = torch.ones_like(weight)
        out[f'norm{i}.bias'] = torch.zeros_like(weight)


def _require(name: str, tensors: StateDict, source: str) -> None:
    if name not in tensors:
        raise ValueError(
            f'source {source!r} expects names such as {name!r}, got {_shorten(list(tensors))}'
        )


def _shorten(names: list[str], limit: int = 5) -> str:
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return (', '.join(names[:limit]) or 'none') + more


CONVERTERS = {
    'mmseg': _from_openmmlab,
    'mmdet': _from_openmmlab,
    'swin': _from_swin,
    'timm': _from_swin,
    'dynamicvit': _from_swin,
}
