"""Decisions for the cells of a map in a neck or head."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmengine.logging import print_log
from torch import Tensor, nn

from ..ops import (
    SELECTORS,
    Decision,
    cell_grid,
    keep_all,
    region,
    resize_scores,
    sample_decision,
    select_decision,
)
from ..registry import MODELS
from .features import is_exporting
from .sparsity import check_choice, check_ratio

# In place of a predictor's config: the decisions come with the feature maps.
BACKBONE = 'backbone'


@dataclass(frozen=True)
class CellSparsity:
    """In how many cells the large convolutions of a neck or head run.

    Args:
        keep_ratio: Share of the cells of each image that are kept, in (0, 1].
        cell_size: Side of a cell, in positions of the finest map: an even number. Defaults to 8.
        selector: How cells are selected at inference, see
            :class:`~mmdynsparse.models.sparsity.Sparsity`. Defaults to 'topk'.
        predictor: Config of the predictor, or 'backbone' for the scores of the backbone's, at this
            keep ratio. Defaults to None, which is up to the neck or head.
    """

    keep_ratio: float
    cell_size: int = 8
    selector: str = 'topk'
    predictor: Mapping | str | None = None

    @classmethod
    def from_cfg(cls, cfg: Mapping) -> 'CellSparsity':
        """Check a config's ``sparsity`` dict.

        Raises:
            ValueError: If a key is unknown or missing, or a value is outside its range.
        """
        allowed = tuple(cls.__dataclass_fields__)
        if unknown := sorted(set(cfg) - set(allowed)):
            raise ValueError(f'sparsity takes the keys {allowed}, got {unknown}')
        if 'keep_ratio' not in cfg:
            raise ValueError(f'sparsity needs keep_ratio, in (0, 1], got only {sorted(cfg)}')
        self = cls(**cfg)
        check_ratio('sparsity.keep_ratio', self.keep_ratio)
        check_choice('sparsity.selector', self.selector, SELECTORS)
        if not isinstance(self.cell_size, int) or self.cell_size < 2 or self.cell_size % 2:
            raise ValueError(
                f'sparsity.cell_size must be an even number from 2 on, got {self.cell_size!r}'
            )
        if isinstance(self.predictor, str) and self.predictor != BACKBONE:
            raise ValueError(
                f'sparsity.predictor must be a config or {BACKBONE!r}, got {self.predictor!r}'
            )
        return self


class Decider(nn.Module):
    """Decides which cells a neck or head keeps.

    Attributes:
        keep_ratios: A list of one, the target keep ratio; change it by ``set_keep_ratio``.
        decisions: The decision of the last call, in a list of one.
        execution: 'gather' (the default) or 'masked', how the neck or head runs in eval mode; in
            training it is always masked.
        follows: Whether the scores are those of the backbone's predictors.
        temperature: Of the Gumbel-softmax by which training samples, > 0; 1 unless changed.
        extra_kept: Share of the cells that training keeps whatever the predictor says, in [0, 1];
            0 unless changed, as ``KeepRatioSchedule`` does.
        has_ratio_loss: Whether something trains the predictor towards the keep ratio; set by
            ``SparsityHook``. A predictor that trains without it warns once.

    Args:
        sparsity: Ratio, selector and predictor.
        embed_dims: Channels of what the predictor sees. Without a predictor the calls bring the
            scores themselves.
    """

    def __init__(self, sparsity: CellSparsity, embed_dims: int) -> None:
        super().__init__()
        self.selector = sparsity.selector
        self.follows = sparsity.predictor == BACKBONE
        self.predictor = None
        if sparsity.predictor is not None and not self.follows:
            self.predictor = MODELS.build({**sparsity.predictor, 'embed_dims': embed_dims})
        self.set_keep_ratio(sparsity.keep_ratio)
        self.decisions: list[Decision] = []
        self.execution = 'gather'
        self.temperature = 1.0
        self.extra_kept = 0.0
        self.has_ratio_loss = False
        self._warned = False

    def set_keep_ratio(self, keep_ratio: float) -> None:
        """Change the keep ratio.

        Raises:
            ValueError: If it is outside (0, 1].
        """
        check_ratio('keep_ratio', keep_ratio)
        self.keep_ratios = [float(keep_ratio)]

    @property
    def gathers(self) -> bool:
        """Whether the neck or head runs gathered."""
        return not self.training and self.execution == 'gather'

    @property
    def keeps_all(self) -> bool:
        """Whether nothing has to be looked at: every cell is kept and nothing is learned."""
        return self.keep_ratios[0] >= 1 and not (self.training and self.predictor is not None)

    def forward(self, x_BNC: Tensor, hw: tuple[int, int]) -> Decision:
        """Decide for cells.

        A predictor in training mode samples, and its gradient ends at the features. So do scores
        through which one learns, then exactly the keep ratio, because that predictor may have
        another. All else selects.

        Args:
            x_BNC: Features of the cells, or without a predictor their log-probabilities
                [keep, drop], (B, N, 2); with no features at all everything is kept.
            hw: Rows and columns of cells, with N of them together.
        """
        decision = self._decide(x_BNC, hw)
        self.decisions = [] if is_exporting() else [decision]
        return decision

    def keep_all(self, x: Tensor, hw: tuple[int, int]) -> Decision:
        """Keep all cells of the maps ``x`` (B, ...) without looking."""
        return self(x.new_empty(len(x), hw[0] * hw[1], 0), hw)

    def known(
        self, inputs: Sequence[Tensor], hw: tuple[int, int], cell_size: int
    ) -> Decision | None:
        """Return the decision if it can be made before anything is computed.

        It can if everything is kept, and if the backbone's predictors are followed. Of the
        backbone's decisions the last one whose locations are no larger than the cells is taken,
        or else the finest; where the backbone keeps everything without looking, so is here.

        Args:
            inputs: What the neck or head gets.
            hw: Height and width of the map of which the cells are.
            cell_size: Side of a cell, in positions.

        Raises:
            ValueError: If the backbone's predictors are to be followed, and the inputs carry no
                decisions.
        """
        grid = cell_grid(hw, cell_size)
        if self.keeps_all:
            return self.keep_all(inputs[0], grid)
        if not self.follows:
            return None
        decisions = getattr(inputs, 'decisions', ())
        if not decisions:
            raise ValueError(
                "sparsity.predictor 'backbone' needs feature maps that carry decisions, from a "
                'sparse backbone and with no neck in between that leaves them behind, got a '
                f'{type(inputs).__name__} of maps without'
            )
        source = _last_fine(decisions, grid)
        if source.keeps_all and not source.scores.requires_grad:
            return self.keep_all(inputs[0], grid)
        return self(_cell_scores(source, hw, cell_size), grid)

    def _decide(self, x_BNC: Tensor, hw: tuple[int, int]) -> Decision:
        (ratio,) = self.keep_ratios
        sampling = dict(temperature=self.temperature, selector=self.selector, extra=self.extra_kept)
        if self.predictor is not None and self.predictor.training:
            self._warn_without_loss(ratio)
            scores = self.predictor(x_BNC.detach())
            return sample_decision(scores, hw, ratio, **sampling)
        if ratio >= 1 or x_BNC.shape[-1] == 0:
            return keep_all(x_BNC, hw)
        if self.training and self.follows and x_BNC.requires_grad:
            return sample_decision(x_BNC, hw, ratio, exact=True, **sampling)
        if self.predictor is not None:
            with region('predictor'):
                x_BNC = self.predictor(x_BNC)
        if self.training:
            ratio = 1 - (1 - ratio) * (1 - self.extra_kept)
        return select_decision(x_BNC, hw, ratio, self.selector, self.gathers)

    def _warn_without_loss(self, ratio: float) -> None:
        if ratio < 1 and not self.has_ratio_loss and not self._warned:
            self._warned = True
            print_log(
                'A sparse neck or head trains without a ratio loss, so nothing holds its keep '
                "rate: add custom_hooks=[dict(type='mmdynsparse.SparsityHook')] to the config.",
                logger='current',
                level=logging.WARNING,
            )

    def __getstate__(self) -> dict:
        """Copies and pickles leave the last decision, and its graph, behind."""
        return {**super().__getstate__(), 'decisions': []}


def _last_fine(decisions: Sequence[Decision], grid: tuple[int, int]) -> Decision:
    """Return the last decision that is at least as fine as a grid, or else the finest."""
    best = decisions[0]
    for decision in decisions[1:]:
        if all(n >= min(m, k) for n, m, k in zip(decision.hw, best.hw, grid, strict=True)):
            best = decision
    return best


def _cell_scores(decision: Decision, hw: tuple[int, int], cell_size: int) -> Tensor:
    """Return log-probabilities (B, N, 2) of the cells of a map from a decision's scores.

    Strides are powers of two. Locations at the right and bottom edge may then reach beyond the map;
    others are taken to divide it evenly.

    Args:
        decision: Made at any stride.
        hw: Height and width of the map.
        cell_size: Side of its cells, in positions.
    """
    (h, w), side = decision.hw, decision.cell_size
    while side * h < hw[0] or side * w < hw[1]:
        side *= 2
    if cell_grid(hw, side) != (h, w):
        new_hw, size = hw, cell_size
    elif cell_size % side:
        new_hw, size = (h * side, w * side), cell_size
    else:
        new_hw, size = (h, w), cell_size // side
    scores = resize_scores(decision.scores, (h, w), new_hw, size)
    rows, columns = cell_grid(hw, cell_size)
    return scores.unflatten(1, cell_grid(new_hw, size))[:, :rows, :columns].flatten(1, 2)
