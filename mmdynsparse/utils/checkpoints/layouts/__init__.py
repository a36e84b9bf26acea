"""Layouts of checkpoints, one family a file.

A layout is known by its source and by the name of a tensor that it always has.
"""

from collections.abc import Callable
from typing import NamedTuple

from . import convnext, resnet, spvit, swin, vit
from .common import StateDict


class Layout(NamedTuple):
    """Sources that use a layout, a name that it always has, and its conversion to ours."""

    sources: tuple[str, ...]
    marker: str
    convert: Callable[[StateDict], StateDict]


OPENMMLAB = ('mmseg', 'mmdet', 'mmpretrain')
LAYOUTS = (
    Layout(('mmseg', 'mmdet'), 'patch_embed.projection.weight', swin.from_openmmlab),
    Layout(('swin', 'timm', 'dynamicvit'), 'layers.0.blocks.0.attn.qkv.weight', swin.from_original),
    Layout(OPENMMLAB, 'stages.0.0.depthwise_conv.weight', convnext.from_openmmlab),
    Layout(('convnext', 'dynamicvit'), 'stages.0.0.dwconv.weight', convnext.from_original),
    Layout(('timm',), 'stages.0.blocks.0.conv_dw.weight', convnext.from_timm),
    Layout((*OPENMMLAB, 'torchvision'), 'layer1.0.conv1.weight', resnet.from_openmmlab),
    Layout(('timm',), 'layer1.0.conv1.weight', resnet.from_timm),
    Layout(('mmseg',), 'layers.0.attn.attn.in_proj_weight', vit.from_openmmlab),
    Layout(('timm', 'lvvit', 'dynamicvit'), 'blocks.0.attn.qkv.weight', vit.from_timm),
    Layout(('spvit',), 'layers.0.blocks.0.norm2.weight', spvit.from_swin),
    Layout(('spvit',), 'blocks.0.norm2.weight', spvit.from_deit),
)
SOURCES = tuple(sorted({source for layout in LAYOUTS for source in layout.sources}))

__all__ = ['LAYOUTS', 'SOURCES', 'Layout', 'StateDict']
