"""Dense heads that look for objects in kept cells of the two finest levels.

What is sparse is our own, after Rao et al. (T-PAMI 2023, arXiv 2207.01580). That a coarser level
says where the head has to look on a finer one is of QueryDet (Yang et al., CVPR 2022, arXiv
2103.09136), which trains a branch for it; here it is the class scores that are there anyway.
Dimension letters: B images, N cells of an image.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from mmengine.structures import InstanceData
from torch import Tensor

from ...layers.cell_conv import check_half_size, kept_cells
from ...layers.cell_stack import Branch, check_branch, run_everywhere, run_in_cells
from ...ops import Decision, Plan, cell_grid, cell_mask, keep_all, put_rows, region, table_map
from ..decider import Decider
from ..features import decisions_of
from ..sparsity import BACKBONE, CellSparsity, LevelSparsity

SPARSE_LEVELS = 2
# Logit of a dropped location in training: low enough to detect nothing that matters, and finite,
# so that an object which is missed there tells the predictor to keep it.
DROPPED_LOGIT = -10.0


class CellHead:
    """What comes before a dense head of mmdet among the bases of its sparse form.

    A location that is not kept detects nothing on its level. Group norms take their statistics
    from kept cells alone, in training as well. A subclass says of which convolutions the head
    consists (``branches``) and what becomes of their predictions (``finish``).

    Args:
        sparsity: ``dict(keep_ratio=r)`` with other arguments of
            :class:`~mmdynsparse.models.sparsity.LevelSparsity`. By default, with
            ``predictor=None``, the class scores of the next coarser level choose the cells, and
            nothing has to be trained; a cell's score is the highest in it. A predictor's config
            decides by the maps. ``dict()`` takes the decision that the features of a
            ``SparseFPN`` carry, for both levels. None is the dense head. Defaults to None.
        **kwargs: Arguments of mmdet's head.

    Raises:
        ValueError: If ``sparsity`` is not valid; with it, if the class scores are not sigmoids, or
            a layer is no plain convolution or has a norm other than a group norm; in a forward, if
            the maps do not halve from level to level, or carry no decision that is needed.
    """

    part: ClassVar[str]  # the head's name in messages
    sparsity_type: ClassVar[type[CellSparsity]] = LevelSparsity

    def __init__(self, sparsity: Mapping | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        self.decider = None
        if sparsity is None:
            return
        if not self.use_sigmoid_cls:
            raise ValueError(
                f'loss_cls must have use_sigmoid in a sparse {self.part}, '
                f'got {type(self.loss_cls).__name__} without'
            )
        for branch in self.branches():
            check_branch(branch)
        if sparsity == {}:
            self.decider = Decider(None)
            return
        cells = self.sparsity_type.from_cfg(sparsity)
        if cells.predictor == BACKBONE:
            raise ValueError(
                f'sparsity.predictor must be a config in a sparse {self.part}, got {BACKBONE!r}; '
                'the decision of a SparseFPN takes sparsity=dict()'
            )
        self.cell_size = cells.cell_size
        self.decider = Decider(cells, self.in_channels, falling=cells.predictor is None)

    @abstractmethod
    def branches(self) -> list[Branch]:
        """Return the branches; the first prediction of the first one is the class scores."""

    def finish(self, level: int, outs: list[Tensor]) -> tuple[Tensor, ...]:
        """Return the head's outputs from the predictions of all branches, location by location."""
        return tuple(outs)

    def forward(self, x: Sequence[Tensor]) -> tuple[list[Tensor], ...]:
        """Return the outputs of mmdet's head: for each of them a map (B, C, H_i, W_i) a level.

        At a dropped location class scores are minus infinity in eval mode and ``DROPPED_LOGIT`` in
        training mode; the other predictions are zero.
        """
        if self.decider is None:
            return super().forward(x)
        least = SPARSE_LEVELS + (self.decider.sparsity is not None and not self.decider.predictor)
        if len(x) < least:
            raise ValueError(
                f'a sparse {self.part} needs maps of at least {least} levels, got {len(x)}'
            )
        outs, decisions = [], []
        for level in reversed(range(len(x))):
            if level >= SPARSE_LEVELS:
                raw = self._predict(x[level])
            else:
                decision = self._decide(level, x, outs[0][0] if outs else None, decisions)
                raw = self._sparse_level(level, x[level], self.decider.plan(decision))
                if not decisions or decision is not decisions[-1]:
                    decisions.append(decision)
            outs.insert(0, raw)
        if self.decider.keep_ratios:
            self.decider(decisions)
        levels = [self.finish(level, raw) for level, raw in enumerate(outs)]
        return tuple(map(list, zip(*levels, strict=True)))

    def _predict(self, x: Tensor, mask_B1HW: Tensor | None = None) -> list[Tensor]:
        return [out for b in self.branches() for out in run_everywhere(b, x, mask_B1HW)]

    def _decide(
        self, level: int, x: Sequence[Tensor], coarse: Tensor | None, before: list[Decision]
    ) -> Decision:
        """Return the neck's decision, or make one about a level.

        Args:
            level: 1, then 0.
            x: Maps of all levels.
            coarse: Class scores of the next level, as logits.
            before: The decisions made so far.
        """
        if not self.decider.keep_ratios:
            return self._decision_of_neck(x)
        hw, size, index = tuple(x[level].shape[2:]), self.cell_size, len(before)
        if self.decider.keeps_all(index, learns=self.training):
            return keep_all(x[level].shape[0], hw, x[level].device, size)
        if self.decider.predictor is not None:
            cells_BNC = self.decider.cells(x[level], size)
            return self.decider.predict(cells_BNC, hw, size, index)
        check_half_size(self.part, hw, tuple(coarse.shape[2:]), size, level)
        best = coarse.detach().amax(1, keepdim=True).float()
        odds_BN1 = F.max_pool2d(best, size // 2, ceil_mode=True).flatten(2).transpose(1, 2)
        log_probs_BN2 = F.logsigmoid(torch.cat((odds_BN1, -odds_BN1), -1))
        among_BN = None
        if before and not before[-1].keeps_all:
            among_BN = cell_mask(before[-1].mask, cell_grid(hw, size), 2).flatten(1)
        return self.decider.decide(log_probs_BN2, hw, size, index, among_BN=among_BN)

    def _decision_of_neck(self, x: Sequence[Tensor]) -> Decision:
        decisions = decisions_of(x)
        # A backbone's decisions are not about these maps.
        hw = tuple(x[0].shape[2:])
        if not decisions or decisions[-1].hw != hw or decisions[-1].cell_size % 2:
            raise ValueError(
                f'sparsity=dict() of a {self.part} needs feature maps that carry a decision, from '
                'a sparse SparseFPN and with no neck in between that leaves it behind, got a '
                f'{type(x).__name__} of maps without; keep_ratio makes it decide by itself'
            )
        return decisions[-1]

    def _sparse_level(self, level: int, x: Tensor, plan: Plan) -> list[Tensor]:
        """Return the predictions of a level, for which dropped locations detect nothing."""
        if plan.form == 'dense':
            return self._predict(x)
        hw = tuple(x.shape[2:])
        if plan.decision.hw == hw:  # else it is about the finest level
            level = 0
        if plan.gathers:
            return self._in_cells(x, plan, level)
        mask = cell_mask(plan.decision.mask, hw, plan.decision.cell_size >> level)
        score, *others = self._predict(x, mask)
        mask = mask.to(score.dtype)
        others = [out * mask for out in others]
        if not self.training:
            return [score.masked_fill(mask == 0, -torch.inf), *others]
        return [score * mask + DROPPED_LOGIT * (1 - mask), *others]

    def _in_cells(self, x: Tensor, plan: Plan, level: int) -> list[Tensor]:
        cells = kept_cells(plan, x, level)
        kept = [out for branch in self.branches() for out in run_in_cells(branch, x, cells)]
        positions, outs = x[:, 0].numel(), []
        with region('scatter'):
            for rows in kept:
                # Of the convolution's dtype, which autocast may have chosen.
                table = rows.new_full((positions + 2, rows.shape[1]), 0 if outs else -torch.inf)
                put_rows(table, cells.rows.inner, rows)
                outs.append(table_map(table, x.shape[0], tuple(x.shape[2:])))
        return outs

    def _predict_by_feat_single(
        self,
        cls_score_list: list[Tensor],
        bbox_pred_list: list[Tensor],
        score_factor_list: list[Tensor | None],
        mlvl_priors: list[Tensor],
        *args,
        **kwargs,
    ) -> InstanceData:
        """Leave dropped locations out, and go on as mmdet's head with those that are there."""
        levels = [cls_score_list, bbox_pred_list, score_factor_list, mlvl_priors]
        if self.decider is not None and not self.training:
            found = [_kept_locations(*level) for level in zip(*levels, strict=True)]
            levels = map(list, zip(*found, strict=True))
        return super()._predict_by_feat_single(*levels, *args, **kwargs)

    def loss_by_feat(self, cls_scores: list[Tensor], *args, **kwargs) -> dict:
        """Return the losses; in eval mode dropped locations count as they do in training."""
        scores = [score.masked_fill(score == -torch.inf, DROPPED_LOGIT) for score in cls_scores]
        return super().loss_by_feat(scores, *args, **kwargs)


def _kept_locations(
    score_CHW: Tensor, box_CHW: Tensor, factor_CHW: Tensor | None, priors: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return a level's predictions (C, 1, K) and priors (K * A, ...) at its K kept locations."""
    kept = (score_CHW[0].flatten() > -torch.inf).nonzero().squeeze(1)
    if kept.shape[0] == score_CHW[0].numel():
        return score_CHW, box_CHW, factor_CHW, priors
    maps = [
        # Rows are contiguous: what is sparse is channels last in memory.
        None if x is None else x.flatten(1).t().index_select(0, kept).t().unsqueeze(1)
        for x in (score_CHW, box_CHW, factor_CHW)
    ]
    priors = priors.unflatten(0, (score_CHW[0].numel(), -1)).index_select(0, kept)
    return *maps, priors.flatten(0, 1)
