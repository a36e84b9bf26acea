"""The ``pruning`` argument of backbones, checked and completed (SPViT)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import NamedTuple

from ..ops import MIXERS
from .geometry import Geometry
from .sparsity import Sparsity, check_part


class BlockPruning(NamedTuple):
    """What is left of one block."""

    mixer: str  # one of ops.MIXERS
    hidden: int  # hidden units of the FFN
    norm_cfg: dict  # of a convolution
    norm_identity: bool  # as of Pruning


@dataclass(frozen=True)
class Pruning:
    """What is left of the self-attentions and FFNs of a backbone, or that gates search for it.

    Args:
        search: Whether the blocks have gates that learn what is left. Defaults to False.
        mixers: For each stage a list with one of 'msa', 'conv3', 'conv1' and 'none' for each
            block; a vision transformer also takes a single list. Defaults to None, 'msa'.
        hidden: Likewise, the hidden units of each FFN, from 0 to those of the dense model.
            Defaults to None, those of the dense model.
        alpha: Divides the logits of the head shares in a search, > 0. Defaults to the published
            value of the family: 100 for Swin, 0.01 for vision transformers.
        init: First logit of every gate in a search, around which ``SinglePathSearchHook`` spreads
            those of hidden units. Defaults to 1.5, the published one.
        norm_cfg: Norm of the convolutions. Defaults to dict(type='BN').
        norm_identity: Whether 'none' adds the normalized tokens, and a convolution the normalized
            class token, as the models that the authors have fine-tuned do. Defaults to False, which
            adds nothing.
    """

    search: bool = False
    mixers: Sequence[Sequence[str]] | None = None
    hidden: Sequence[Sequence[int]] | None = None
    alpha: float = 100.0
    init: float = 1.5
    norm_cfg: dict = field(default_factory=lambda: dict(type='BN'))
    norm_identity: bool = False

    @classmethod
    def from_cfg(
        cls, cfg: Mapping, depths: Sequence[int], widths: Sequence[int], **defaults
    ) -> 'Pruning':
        """Check a config's ``pruning`` dict.

        Args:
            cfg: The dict.
            depths: Blocks of each stage.
            widths: Hidden units of the FFNs of each stage in the dense model.
            **defaults: Of a family, where they differ from those of this class.

        Raises:
            ValueError: If a key is unknown, or a value is outside its range or does not fit the
                model.
        """
        allowed = tuple(cls.__dataclass_fields__)
        if not isinstance(cfg, Mapping):
            raise ValueError(f'pruning must be None or a dict with the keys {allowed}, got {cfg!r}')
        if unknown := sorted(set(cfg) - set(allowed), key=str):
            raise ValueError(f'pruning takes the keys {allowed}, got {unknown}')
        self = cls(**{**defaults, **cfg})
        self._check_values()
        lists = self.mixers is not None or self.hidden is not None
        if self.search == lists:
            raise ValueError(
                'pruning must have either search=True or mixers and hidden, got '
                f'{dict(cfg, search=self.search)}'
            )
        dense = (['msa'] * depth for depth in depths)
        mixers = _by_stage('mixers', self.mixers or tuple(dense), depths)
        full = tuple([width] * depth for width, depth in zip(widths, depths, strict=True))
        hidden = _by_stage('hidden', full if self.hidden is None else self.hidden, depths)
        _check_mixers(mixers)
        _check_hidden(hidden, widths)
        return replace(self, mixers=mixers, hidden=hidden)

    def block(self, stage: int, block: int) -> BlockPruning:
        """Return what is left of a block."""
        mixer, hidden = self.mixers[stage][block], self.hidden[stage][block]
        return BlockPruning(mixer, hidden, self.norm_cfg, self.norm_identity)

    @property
    def search_cfg(self) -> dict:
        """Arguments of an attention with gates."""
        return dict(alpha=self.alpha, init=self.init, norm_cfg=self.norm_cfg)

    def _check_values(self) -> None:
        for name in ('search', 'norm_identity'):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f'pruning.{name} must be True or False, got {getattr(self, name)!r}'
                )
        for name in ('alpha', 'init'):
            value = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool) or value != value:
                raise ValueError(f'pruning.{name} must be a number, got {value!r}')
        if not self.alpha > 0:
            raise ValueError(f'pruning.alpha must be above 0, got {self.alpha!r}')
        if self.search and self.norm_identity:
            raise ValueError('pruning.norm_identity must be False with search=True, got True')
        check_part('pruning.norm_cfg', self.norm_cfg)


def parse_pruning(
    cfg: Mapping | None, geometry: Geometry, sparsity: Sparsity | None, **defaults
) -> Pruning | None:
    """Return the checked ``pruning`` of a backbone, None without.

    Args:
        cfg: The argument of the backbone.
        geometry: Sizes of the backbone.
        sparsity: That of the backbone.
        **defaults: As of ``Pruning.from_cfg``.

    Raises:
        ValueError: As of ``Pruning.from_cfg``, or if a search is to be sparse.
    """
    if cfg is None:
        return None
    pruning = Pruning.from_cfg(cfg, geometry.depths, geometry.widths, **defaults)
    if pruning.search and sparsity is not None:
        raise ValueError(
            'sparsity must be None with pruning.search=True: prune first, then make the pruned '
            f'model sparse; got keep_ratio {sparsity.keep_ratio}'
        )
    return pruning


def _by_stage(name: str, value: object, depths: Sequence[int]) -> tuple[tuple, ...]:
    """Return lists of stages as tuples; one stage may do without the outer list."""
    is_list = isinstance(value, list | tuple)
    if is_list and len(depths) == 1 and not any(isinstance(v, list | tuple) for v in value):
        value = [value]
    lengths = [len(v) if isinstance(v, list | tuple) else v for v in value] if is_list else value
    if lengths != list(depths):
        raise ValueError(
            f'pruning.{name} must have one value for each block, stages of {list(depths)} blocks, '
            f'got {lengths!r}'
        )
    return tuple(tuple(v) for v in value)


def _check_mixers(mixers: Sequence[Sequence[str]]) -> None:
    for i, stage in enumerate(mixers):
        for j, mixer in enumerate(stage):
            if mixer not in MIXERS:
                raise ValueError(f'pruning.mixers[{i}][{j}] must be one of {MIXERS}, got {mixer!r}')


def _check_hidden(hidden: Sequence[Sequence[int]], widths: Sequence[int]) -> None:
    for i, (stage, width) in enumerate(zip(hidden, widths, strict=True)):
        for j, units in enumerate(stage):
            whole = isinstance(units, int) and not isinstance(units, bool)
            if not whole or not 0 <= units <= width:
                raise ValueError(
                    f'pruning.hidden[{i}][{j}] must be a whole number from 0 to {width}, the '
                    f'hidden units of the dense model, got {units!r}'
                )
