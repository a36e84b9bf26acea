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
    geometry, pruning = parse_architecture(backbone)
    if pruning is None:
        return geometry.macs(hw)
    return geometry.macs(hw, pruning.mixers, pruning.hidden)


def parse_architecture(backbone: Mapping) -> tuple[Geometry, Pruning | None]:
    """Return sizes and pruning of a backbone's config; errors as of ``architecture_macs``."""
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
