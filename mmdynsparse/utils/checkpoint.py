"""Checkpoints of other code bases for our backbones."""

from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from .input_checks import read_checkpoint
from .layouts import LAYOUTS, SOURCES, StateDict


def convert_checkpoint(state_dict: Mapping, source: str) -> StateDict:
    """Convert a checkpoint to the layout of our backbones.

    Args:
        state_dict: Tensors by name, or a checkpoint that holds them under 'state_dict' or
            'model'; of a whole OpenMMLab model only the backbone is taken.
        source: Where it comes from: 'mmseg', 'mmdet', 'mmpretrain' (ConvNeXt, ResNet), 'swin'
            and 'convnext' (the original repositories), 'torchvision' (ResNet), 'timm', or
            'dynamicvit' (the published DynamicSwin, DynamicCNN and DynamicViT). The family is
            known from the names.

    Returns:
        The backbone's state dict. Classification layouts have a norm after the last stage only;
        those of the other stages start as identity. Original Swins do not shift windows on a map
        that fits into one window; the state dict's metadata says so to the backbone that loads it.

    Raises:
        ValueError: If the source is unknown or the names are not those of its layouts.
    """
    if source not in SOURCES:
        raise ValueError(f'source must be one of {SOURCES}, got {source!r}')
    tensors = _backbone_tensors(state_dict)
    layouts = [layout for layout in LAYOUTS if source in layout.sources]
    for layout in layouts:
        if layout.marker in tensors:
            return layout.convert(tensors)
    markers = ' or '.join(repr(layout.marker) for layout in layouts)
    raise ValueError(
        f'source {source!r} expects names such as {markers}, got {_shorten(list(tensors))}'
    )


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
    checkpoint = read_checkpoint('init_cfg.checkpoint', filename)
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


def resize_pos_embed(
    embed_1NC: Tensor, hw: tuple[int, int], new_hw: tuple[int, int], mode: str = 'bicubic'
) -> Tensor:
    """Resize a position embedding (1, H * W, C) from ``hw`` to ``new_hw`` tokens."""
    if hw == new_hw:
        return embed_1NC
    embed_1CHW = embed_1NC.unflatten(1, hw).permute(0, 3, 1, 2)
    resized = F.interpolate(embed_1CHW, size=new_hw, mode=mode, align_corners=False)
    return resized.flatten(2).transpose(1, 2)


def _backbone_tensors(state_dict: Mapping) -> StateDict:
    """Unwrap a checkpoint and strip the prefixes of wrappers and of the backbone."""
    for wrapper in ('state_dict', 'model'):
        state_dict = state_dict.get(wrapper, state_dict)
    metadata = getattr(state_dict, '_metadata', {})
    tensors = {k.removeprefix('module.'): v for k, v in state_dict.items()}
    metadata = {k.removeprefix('module.'): v for k, v in metadata.items()}
    prefix = 'backbone.' if any(k.startswith('backbone.') for k in tensors) else ''
    out = OrderedDict((k[len(prefix) :], v) for k, v in tensors.items() if k.startswith(prefix))
    out._metadata = OrderedDict({'': metadata.get(prefix[:-1], {})})
    return out


def _shorten(names: list[str], limit: int = 5) -> str:
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return (', '.join(names[:limit]) or 'none') + more
