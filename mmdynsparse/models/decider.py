"""Decisions for the cells of a map in a neck or head."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from ..ops import SELECTORS, Decision, keep_all, region, sample_decision, select_decision
from ..registry import MODELS
from .sparsity import check_choice, check_ratio


@dataclass(frozen=True)
class CellSparsity:
    """In how many cells the large convolutions of a neck or head run.

    Args:
        keep_ratio: Share of the cells of each image that are kept, in (0, 1].
        cell_size: Side of a cell, in positions of the finest map: an even number. Defaults to 8.
        selector: How cells are selected at inference, see
            :class:`~mmdynsparse.models.sparsity.Sparsity`. Defaults to 'topk'.
        predictor: Config of the predictor. Defaults to None, which is up to the neck or head.
    """

    keep_ratio: float
    cell_size: int = 8
    selector: str = 'topk'
    predictor: Mapping | None = None

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
        return self


class Decider(nn.Module):
    """Decides which cells a neck or head keeps.

    Attributes:
        keep_ratios: A list of one, the target keep ratio; change it by ``set_keep_ratio``.
        decisions: The decision of the last call, in a list of one.
        execution: 'gather' (the default) or 'masked', how the neck or head runs in eval mode; in
            training it is always masked.
        temperature: Of the Gumbel-softmax by which training samples, > 0; 1 unless changed.
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
        self.predictor = None
        if sparsity.predictor is not None:
            self.predictor = MODELS.build({**sparsity.predictor, 'embed_dims': embed_dims})
        self.set_keep_ratio(sparsity.keep_ratio)
        self.decisions: list[Decision] = []
        self.execution = 'gather'
        self.temperature = 1.0
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

        Args:
            x_BNC: Features of the cells, or without a predictor their log-probabilities
                [keep, drop], (B, N, 2).
            hw: Rows and columns of cells, with N of them together.
        """
        decision = self._decide(x_BNC, hw)
        self.decisions = [] if _is_exporting() else [decision]
        return decision

    def keep_all(self, x: Tensor, hw: tuple[int, int]) -> Decision:
        """Keep all cells of the maps ``x`` (B, ...) without looking; for ``keeps_all``."""
        return self(x.new_empty(len(x), hw[0] * hw[1], 0), hw)

    def _decide(self, x_BNC: Tensor, hw: tuple[int, int]) -> Decision:
        (ratio,) = self.keep_ratios
        if self.predictor is not None and self.predictor.training:
            self._warn_without_loss(ratio)
            scores = self.predictor(x_BNC)
            return sample_decision(scores, hw, ratio, self.temperature, self.selector)
        if ratio >= 1:
            return keep_all(x_BNC, hw)
        if self.predictor is not None:
            with region('predictor'):
                x_BNC = self.predictor(x_BNC)
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
        return {**self.__dict__, 'decisions': []}


class Features(tuple):
    """Feature maps of a neck, with its decision about them.

    OpenMMLab's models hand it on as the tuple that it is.

    Args:
        maps: The feature maps.
        decision: Which cells of the finest maps are kept.
        cell_size: Side of a cell in the first map, in positions.
    """

    decision: Decision
    cell_size: int

    def __new__(cls, maps: Iterable[Tensor], decision: Decision, cell_size: int) -> 'Features':
        """Make the tuple of ``maps``."""
        self = super().__new__(cls, maps)
        self.decision = decision
        self.cell_size = cell_size
        return self


def _is_exporting() -> bool:
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
