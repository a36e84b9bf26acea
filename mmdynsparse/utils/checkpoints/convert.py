"""Checkpoints of other code bases for our backbones."""

from collections import OrderedDict
from collections.abc import Mapping

from .layouts import LAYOUTS, SOURCES, StateDict


def convert_checkpoint(state_dict: Mapping, source: str) -> StateDict:
    """Convert a checkpoint to the layout of our backbones.

    Args:
        state_dict: Tensors by name, or a checkpoint that holds them under 'state_dict' or
            'model'; of a whole OpenMMLab model only the backbone is taken.
        source: Where it comes from: 'mmseg', 'mmdet', 'mmpretrain' (ConvNeXt, ResNet), 'swin'
            and 'convnext' (the original repositories), 'lvvit' (TokenLabeling), 'torchvision'
            (ResNet), 'timm', 'dynamicvit' (the published DynamicSwin, DynamicCNN and
            DynamicViT, of LV-ViT too), or 'spvit' (the published SPViT on Swin and DeiT). The
            family is known from the names.

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
        f'source {source!r} expects names such as {markers}, got {shorten(list(tensors))}'
    )


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


def shorten(names: list[str], limit: int = 5) -> str:
    """List the first names, and say how many more there are."""
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return (', '.join(names[:limit]) or 'none') + more
