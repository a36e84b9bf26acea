"""The ``sparsity`` argument of backbones, necks and heads, checked and completed."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import ClassVar

from ..ops import CLAMPED, SELECTORS

# In place of a predictor's config: the scores come with the feature maps.
BACKBONE = 'backbone'
# Ratios of consecutive predictors of one stage (Rao et al., T-PAMI 2023, section 4.1); rounded,
# because 0.7 - 0.2 in binary is just below 0.5 and would keep one location less.
SCHEDULES = {
    'subtract': lambda ratio, i: round(ratio - 0.2 * i, 6),
    'power': lambda ratio, i: round(ratio ** (i + 1), 6),
}


@dataclass(frozen=True)
class Sparsity:
    """Where and how much a backbone is sparse.

    Args:
        keep_ratio: Share of locations that take the slow path, in (0, 1]: a number for the first
            decision of each sparse stage, continued by ``schedule``, or one value for every
            decision. 1.0 keeps everything: the dense model.
        locations: Stage index (from 0) to the blocks before which a predictor decides. Defaults
            to None, three places in the third stage as published.
        schedule: 'subtract' (r, r - 0.2, r - 0.4) or 'power' (r, r^2, r^3), for a number as
            ``keep_ratio``. Defaults to 'subtract'.
        selector: How locations are selected at inference: 'topk' keeps a fixed share of each
            image; 'sampled' as many, with a fixed noise as that of training, so that each decision
            drops other locations; 'threshold' (P(keep) > 0.5) and 'mass' (the fewest locations
            that hold ``keep_ratio`` of the sum of P(keep)) and 'value' (P(keep) of at least
            ``1 / keep_ratio - 1`` times its mean) adapt to the image; 'random', in training too,
            is the control that shows what the predictors learn. dict(type='mass', least=0.1,
            most=1.0), or 'value', states the smallest and the largest share of all locations that
            is kept; by default it is at least one location. Defaults to 'topk'.
        predictor: Config of the predictor. Defaults to the published one.
        fast_path: Config of the path of dropped locations, or None to leave them unchanged.
            Defaults to the published one.
        cell_size: Side of the cells for which is decided in each stage, in locations; 1 is each
            location by itself. Defaults to None, 1 in every stage.
        follow: Stages of ``locations``, with one block each, without a predictor: the scores of
            the last decision before are carried over to their map, with its keep ratio. Training
            samples anew from them. Defaults to ().
        attention: Whether window attention, too, updates kept tokens only. Defaults to False.
    """

    keep_ratio: float | Sequence[float]
    locations: Mapping[int, Sequence[int]] | None = None
    schedule: str = 'subtract'
    selector: str | Mapping = 'topk'
    predictor: dict = field(default_factory=lambda: dict(type='mmdynsparse.LocalGlobalPredictor'))
    fast_path: dict | None = field(default_factory=lambda: dict(type='mmdynsparse.LinearFastPath'))
    cell_size: Sequence[int] | None = None
    follow: Sequence[int] = ()
    attention: bool = False

    @classmethod
    def from_cfg(cls, cfg: Mapping, depths: Sequence[int], **defaults) -> 'Sparsity':
        """Check a config's ``sparsity`` dict against the depths of the stages.

        Args:
            cfg: The dict.
            depths: Blocks of each stage.
            **defaults: Of a family, where they differ from those of this class.

        Raises:
            ValueError: If a key is unknown or missing, or a value is outside its range.
        """
        check_keys(cfg, cls)
        self = cls(**{**defaults, **cfg})
        check_choice('sparsity.schedule', self.schedule, SCHEDULES)
        check_selector(self.selector)
        check_part('sparsity.predictor', self.predictor)
        check_part('sparsity.fast_path', self.fast_path, or_none=True)
        locations = default_locations(depths) if self.locations is None else self.locations
        self = replace(self, locations=_checked_locations(locations, depths))
        _check_cell_size(self.cell_size, len(depths))
        _check_follow(self.follow, self.locations)
        if not isinstance(self.attention, bool):
            raise ValueError(f'sparsity.attention must be True or False, got {self.attention!r}')
        self.resolve(self.keep_ratio)
        return self

    def index(self, stage: int, block: int) -> int:
        """Return the number of the decision that is made before a block."""
        places = [(i, b) for i, blocks in self.locations.items() for b in blocks]
        return places.index((stage, block))

    @property
    def followers(self) -> tuple[bool, ...]:
        """Whether each decision follows the one before it, and so has its keep ratio."""
        return tuple(stage in self.follow for stage, b in self.locations.items() for _ in b)

    def resolve(self, keep_ratio: float | Sequence[float]) -> list[float]:
        """Return the keep ratio of every decision, in the order of stages and blocks.

        Raises:
            ValueError: If a ratio is outside (0, 1], the list has the wrong length or a stage that
                follows has another ratio than the decision that it follows.
        """
        followers = self.followers
        if not isinstance(keep_ratio, list | tuple):
            check_ratio('keep_ratio', keep_ratio)
            if keep_ratio == 1:
                return [1.0] * len(followers)
            step = SCHEDULES[self.schedule]
            ratios = []
            for stage, blocks in self.locations.items():
                own = [step(keep_ratio, i) for i in range(len(blocks))]
                ratios += ratios[-1:] if stage in self.follow else own
            hint = f' (keep_ratio {keep_ratio} with schedule {self.schedule!r})'
        else:
            ratios, hint = list(keep_ratio), ''
            if len(ratios) != len(followers):
                raise ValueError(
                    f'keep_ratio must be a number or a list of {len(followers)} values, one for '
                    f'each decision, got {len(ratios)} values: {ratios}'
                )
            for i, follows in enumerate(followers):
                if follows and ratios[i] != ratios[i - 1]:
                    raise ValueError(
                        f'keep_ratio of decision {i}, which follows the one before it, must be '
                        f'{ratios[i - 1]}, got {ratios[i]}'
                    )
        for i, ratio in enumerate(ratios):
            check_ratio(f'keep_ratio of decision {i}', ratio, hint)
        return [float(r) for r in ratios]


@dataclass(frozen=True)
class CellSparsity:
    """In how many cells the large convolutions of a neck or head run.

    Args:
        keep_ratio: Share of the cells of each image that are kept, in (0, 1].
        cell_size: Side of a cell, in positions of the finest map: an even number. Defaults to 8.
        selector: How cells are selected at inference, see :class:`Sparsity`. Defaults to 'topk'.
        predictor: Config of the predictor, or 'backbone' for the scores of the backbone's, at this
            keep ratio. Defaults to None, which is up to the neck or head.
    """

    keep_ratio: float
    cell_size: int = 8
    selector: str | Mapping = 'topk'
    predictor: Mapping | str | None = None

    @classmethod
    def from_cfg(cls, cfg: Mapping, **defaults) -> 'CellSparsity':
        """Check a config's ``sparsity`` dict, as :meth:`Sparsity.from_cfg` does."""
        check_keys(cfg, cls)
        self = cls(**{**defaults, **cfg})
        self.resolve(self.keep_ratio)
        check_selector(self.selector)
        if not isinstance(self.cell_size, int) or self.cell_size < 2 or self.cell_size % 2:
            raise ValueError(
                f'sparsity.cell_size must be an even number from 2 on, got {self.cell_size!r}'
            )
        if self.predictor not in (None, BACKBONE) and not _is_part(self.predictor):
            raise ValueError(
                f'sparsity.predictor must be a config or {BACKBONE!r}, got {self.predictor!r}'
            )
        return self

    followers: ClassVar[tuple[bool, ...]] = (False,)

    def resolve(self, keep_ratio: float | Sequence[float]) -> list[float]:
        """Return the keep ratio of the only decision, a number or a list of one, in (0, 1]."""
        return resolve_single(keep_ratio)


@dataclass(frozen=True)
class RegionSparsity:
    """How many regions of an image, proposals or detections, take the slow path.

    Args:
        keep_ratio: Share of the regions of each image, in (0, 1]; with the selector 'mass' of the
            sum of their scores.
        selector: How they are selected, see :class:`Sparsity`. Defaults to 'topk'.
    """

    keep_ratio: float
    selector: str | Mapping = 'topk'

    predictor: ClassVar[None] = None
    followers: ClassVar[tuple[bool, ...]] = (False,)

    @classmethod
    def from_cfg(cls, cfg: Mapping) -> 'RegionSparsity':
        """Check a config's ``sparsity`` dict, as :meth:`Sparsity.from_cfg` does."""
        check_keys(cfg, cls)
        self = cls(**cfg)
        check_ratio('sparsity.keep_ratio', self.keep_ratio)
        check_selector(self.selector)
        return self

    def resolve(self, keep_ratio: float | Sequence[float]) -> list[float]:
        """As :meth:`CellSparsity.resolve`."""
        return resolve_single(keep_ratio)


@dataclass(frozen=True)
class LevelSparsity(CellSparsity):
    """In how many cells of the two finest levels the head of a one-stage detector runs.

    Args:
        keep_ratio: Share of the cells of each image that are kept, in (0, 1]: of the finest level,
            or a list of the second level's and the finest one's. The second level keeps twice as
            large a share if it is not given, because its scores choose the cells of the finest,
            and it has a quarter as many.
        cell_size: Side of a cell, in positions of its level: an even number. Defaults to 8.
        selector: As of :class:`CellSparsity`.
        predictor: Config of the predictor. Defaults to None, the class scores of the next level.
    """

    keep_ratio: float | Sequence[float]

    followers: ClassVar[tuple[bool, ...]] = (False, False)

    def resolve(self, keep_ratio: float | Sequence[float]) -> list[float]:
        """Return the keep ratios of the second level and of the finest, in (0, 1]."""
        ratios = keep_ratio
        if not isinstance(ratios, list | tuple):
            check_ratio('sparsity.keep_ratio', ratios)
            ratios = (min(1.0, 2 * ratios), ratios)
        if len(ratios) != len(self.followers):
            raise ValueError(
                'sparsity.keep_ratio must be a number or a list of 2, of the second level and of '
                f'the finest, got {list(ratios)}'
            )
        for ratio in ratios:
            check_ratio('sparsity.keep_ratio', ratio)
        return [float(ratio) for ratio in ratios]


def default_locations(depths: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """Return the published places: in the third stage, blocks 1-2-3 of 6 or 2-4-6 of 18."""
    stage = min(2, len(depths) - 1)
    step = max(depths[stage] // 9, 1)
    blocks = tuple(b for b in (step, 2 * step, 3 * step) if b < depths[stage])
    return {stage: blocks or (0,)}


def resolve_single(keep_ratio: float | Sequence[float]) -> list[float]:
    """Return the keep ratio of a part with one decision, a number or a list of one, in (0, 1]."""
    if isinstance(keep_ratio, list | tuple) and len(keep_ratio) == 1:
        keep_ratio = keep_ratio[0]
    check_ratio('sparsity.keep_ratio', keep_ratio)
    return [float(keep_ratio)]


def check_keys(cfg: Mapping, cls: type) -> None:
    """Raise a ValueError if a ``sparsity`` argument is no dict of the fields of a class."""
    allowed = tuple(f.name for f in fields(cls))  # no class variables
    if not isinstance(cfg, Mapping):
        raise ValueError(f'sparsity must be None or a dict with the keys {allowed}, got {cfg!r}')
    if unknown := sorted(set(cfg) - set(allowed), key=str):
        raise ValueError(f'sparsity takes the keys {allowed}, got {unknown}')
    if 'keep_ratio' not in cfg:
        raise ValueError(f'sparsity needs keep_ratio, in (0, 1], got only {sorted(cfg)}')


def check_part(name: str, cfg: object, or_none: bool = False) -> None:
    """Raise a ValueError if a value is no config of a module."""
    if not _is_part(cfg) and not (cfg is None and or_none):
        none = 'None or ' if or_none else ''
        raise ValueError(f"{name} must be {none}a config such as dict(type='...'), got {cfg!r}")


def check_selector(selector: object) -> None:
    """Raise a ValueError if a value is no selector, by its name or with arguments."""
    if not isinstance(selector, Mapping):
        return check_choice('sparsity.selector', selector, SELECTORS)
    if not {'type'} <= set(selector) <= {'type', 'least', 'most'}:
        raise ValueError(
            f'sparsity.selector takes type and perhaps least and most, got {dict(selector)}'
        )
    check_choice('sparsity.selector.type', selector['type'], CLAMPED)
    limits = selector.get('least', 0), selector.get('most', 1)
    numbers = all(isinstance(x, Real) and not isinstance(x, bool) for x in limits)
    if not numbers or not 0 <= limits[0] <= limits[1] <= 1 or limits[1] == 0:
        raise ValueError(
            'sparsity.selector must have 0 <= least <= most <= 1 and most > 0, '
            f'got {dict(selector)}'
        )


def check_choice(name: str, value: str, allowed: Collection[str]) -> None:
    """Raise a ValueError if a value is none of those allowed."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f'{name} must be one of {tuple(allowed)}, got {value!r}')


def check_ratio(name: str, value: float, hint: str = '') -> None:
    """Raise a ValueError if a keep ratio is not a number in (0, 1]."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 < value <= 1:
        raise ValueError(f'{name} must be a number in (0, 1], got {value!r}{hint}')


def _is_part(cfg: object) -> bool:
    return isinstance(cfg, Mapping) and 'type' in cfg


def _checked_locations(locations: object, depths: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """Return the blocks of each stage, in the order of stages."""
    if not isinstance(locations, Mapping):
        raise ValueError(
            'sparsity.locations must be a dict of stages and lists of their blocks, such as '
            f'{default_locations(depths)}, got {locations!r}'
        )
    if not locations:
        raise ValueError('sparsity.locations takes at least one stage, got none')
    checked = {}
    for stage, blocks in locations.items():
        if str(stage) not in map(str, range(len(depths))):
            raise ValueError(
                f'sparsity.locations takes stages 0 to {len(depths) - 1}, got stage {stage!r}'
            )
        last = depths[int(stage)] - 1
        is_list = isinstance(blocks, list | tuple) and len(blocks) > 0
        if (
            not is_list
            or not all(isinstance(b, int) and 0 <= b <= last for b in blocks)
            or list(blocks) != sorted(set(blocks))
        ):
            raise ValueError(
                f'sparsity.locations[{stage}] takes a list of ascending block indices 0 to {last}, '
                f'got {blocks!r}'
            )
        checked[int(stage)] = tuple(blocks)
    return dict(sorted(checked.items()))


def _check_cell_size(cell_size: Sequence[int] | None, stages: int) -> None:
    if cell_size is None:
        return
    valid = isinstance(cell_size, list | tuple) and len(cell_size) >= stages
    if not valid or not all(isinstance(size, int) and size >= 1 for size in cell_size):
        raise ValueError(
            f'sparsity.cell_size must be at least 1 in each of {stages} stages, got {cell_size}'
        )


def _check_follow(follow: Sequence[int], locations: dict[int, tuple[int, ...]]) -> None:
    allowed = tuple(locations)[1:]
    if not isinstance(follow, list | tuple) or not set(follow) <= set(allowed):
        raise ValueError(
            'sparsity.follow takes stages of sparsity.locations after the first of them, '
            f'{allowed}, got {follow}'
        )
    for stage in follow:
        if len(locations[stage]) > 1:
            raise ValueError(
                f'sparsity.locations[{stage}] takes one block in a stage of sparsity.follow, '
                f'got {locations[stage]}'
            )
