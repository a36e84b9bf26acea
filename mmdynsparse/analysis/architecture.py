"""Multiply-adds of pruned backbones in closed form, without a model (SPViT)."""

import inspect
from collections.abc import Mapping

from ..models.backbones import SparseSwinTransformer, SparseVisionTransformer
from ..models.geometry import Geometry, swin_geometry, vit_geometry
from ..models.pruning import Pruning

GEOMETRIES = {SparseSwinTransformer: swin_geometry, SparseVisionTransformer: vit_geometry}


def architecture_macs(backbone: Mapping, hw: tuple[int, int]) -> int:
    """Return the multiply-adds of a backbone for one image.

    They are those of matrix products, convolutions and attention, as ``count_macs`` counts them,
    for a model that is not sparse.

    Args:
        backbone: Config of a ``SparseSwinTransformer`` or ``SparseVisionTransformer``, with or
            without ``pruning``.
        hw: Height and width of the image, in px.

    Raises:
        ValueError: If the type is another one, or ``pruning`` is not valid.
    """
    geometry, pruning = _parse(backbone)
    if pruning is None:
        return geometry.macs(hw)
    return geometry.macs(hw, pruning.mixers, pruning.hidden)


def published_macs(backbone: Mapping, hw: tuple[int, int], num_classes: int = 1000) -> int:
    """Return the multiply-adds of a classifier as ziplab/SPViT counts them.

    Their formula also counts norms, with an operation for each channel, and gives the FFNs and the
    convolutions of a DeiT no class token. Arguments and errors are those of
    :func:`architecture_macs`.
    """
    geometry, pruning = _parse(backbone)
    shapes, maps = geometry.shapes(hw), geometry.maps(hw)
    mixers, hidden = (None, None) if pruning is None else (pruning.mixers, pruning.hidden)
    total = geometry.macs(hw, mixers, hidden) + num_classes * geometry.channels[-1]
    for i, (shape, run) in enumerate(zip(shapes, geometry.run, strict=True)):
        total += 2 * shape.tokens * shape.channels * run
        units = [geometry.widths[i]] * run if hidden is None else hidden[i]
        total -= 2 * geometry.class_tokens * shape.channels * sum(units)
    if geometry.window is not None:
        sizes = [h * w for h, w in maps]
        total += sizes[0] * geometry.channels[0]
        total += sum(n * c for n, c in zip(sizes, geometry.channels[:-1], strict=False))
        total += geometry.channels[-1] * sizes[0] // 2 ** len(sizes)
    return total


def _parse(backbone: Mapping) -> tuple[Geometry, Pruning | None]:
    kinds = {f'mmdynsparse.{kind.__name__}': kind for kind in GEOMETRIES}
    kind = kinds.get(backbone.get('type'), backbone.get('type'))
    if kind not in GEOMETRIES:
        raise ValueError(
            f'backbone.type must be one of {tuple(kinds)}, got {backbone.get("type")!r}'
        )
    signature = inspect.signature(kind)
    given = {k: v for k, v in backbone.items() if k != 'type'}
    arguments = signature.bind(**given)
    arguments.apply_defaults()
    values = arguments.arguments
    build = GEOMETRIES[kind]
    geometry = build(**{name: values[name] for name in inspect.signature(build).parameters})
    if values['pruning'] is None:
        return geometry, None
    return geometry, Pruning.from_cfg(values['pruning'], geometry.depths, geometry.widths)
