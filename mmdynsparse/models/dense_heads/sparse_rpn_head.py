"""RPN head that looks for objects in kept cells of the two finest levels.

Source: Ren et al., *Faster R-CNN* (arXiv 1506.01497), as ``RPNHead`` of mmdetection 3.x, whose
arguments and state-dict names it has. What is sparse is our own, after Rao et al. (T-PAMI 2023,
arXiv 2207.01580). Dimension letters: B images, A anchors of a location, K kept cells.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from mmdet.models.dense_heads import RPNHead
from mmengine.structures import InstanceData
from torch import Tensor

from ...layers.cell_conv import check_half_size, kept_cells
from ...layers.conv_norm import convolve
from ...ops import (
    Decision,
    Plan,
    cell_mask,
    keep_all,
    put_rows,
    region,
    table_map,
    tile_rows,
)
from ...registry import MODELS
from ..decider import Decider
from ..features import decisions_of
from ..sparsity import CellSparsity

SPARSE_LEVELS = 2
# Logit of a dropped location in training: low enough to propose nothing that matters, and finite,
# so that an object which is missed there tells the predictor to keep it.
DROPPED_LOGIT = -10.0


@MODELS.register_module()
class SparseRPNHead(RPNHead):
    """RPN head that computes kept cells of the two finest levels.

    A location that is not kept proposes nothing on its level.

    Args:
        sparsity: ``dict()`` for the decision that the features of a ``SparseFPN`` carry; or
            arguments of
            :class:`~mmdynsparse.models.sparsity.CellSparsity` for a decision of the head's own,
            by default with a ``mmdynsparse.CellPredictor`` on the second level. None is the
            dense head. Defaults to None.
        **kwargs: Arguments of mmdet's ``RPNHead``.

    Raises:
        ValueError: If ``sparsity`` is not valid, or with it ``num_convs`` is not 1 or the class
            scores are not sigmoids; in a forward, if the features carry no decision that is needed.
    """

    original: ClassVar[str] = 'RPNHead'

    def __init__(self, sparsity: Mapping | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        self.decider = None
        if sparsity is None:
            return
        if self.num_convs != 1 or not self.use_sigmoid_cls:
            raise ValueError(
                'a sparse RPN head must have num_convs 1 and a loss_cls with use_sigmoid, '
                f'got num_convs {self.num_convs}, use_sigmoid {self.use_sigmoid_cls}'
            )
        if sparsity == {}:
            self.decider = Decider(None)
            return
        predictor = dict(type='mmdynsparse.CellPredictor')
        cells = CellSparsity.from_cfg(sparsity, predictor=predictor)
        if not isinstance(cells.predictor, Mapping):
            raise ValueError(
                'sparsity.predictor must be a config in an RPN head, '
                f'got {cells.predictor!r}; the decision of a SparseFPN takes sparsity=dict()'
            )
        self.cell_size = cells.cell_size
        self.decider = Decider(cells, self.in_channels)

    def forward(self, x: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return class scores (B, A, H_i, W_i) and box deltas (B, 4 A, H_i, W_i) of all levels."""
        if self.decider is None:
            return super().forward(x)
        if len(x) < SPARSE_LEVELS:
            raise ValueError(
                f'a sparse RPN head needs maps of at least {SPARSE_LEVELS} levels, got {len(x)}'
            )
        plan = self.decider.plan(self._decide(x))
        if plan.form == 'dense':
            return super().forward(x)
        outs = [self._sparse_level(x[i], plan, i) for i in range(SPARSE_LEVELS)]
        outs += [self.forward_single(level) for level in x[SPARSE_LEVELS:]]
        scores, deltas = zip(*outs, strict=True)
        return list(scores), list(deltas)

    def _decide(self, x: Sequence[Tensor]) -> Decision:
        """Return the neck's decision, or make one."""
        hw = tuple(x[0].shape[2:])
        if not self.decider.keep_ratios:
            decisions = decisions_of(x)
            # A backbone's decisions are not about these maps.
            if not decisions or decisions[-1].hw != hw or decisions[-1].cell_size % 2:
                raise ValueError(
                    'sparsity=dict() of an RPN head needs feature maps that carry a decision, from '
                    'a sparse SparseFPN and with no neck in between that leaves it behind, got a '
                    f'{type(x).__name__} of maps without; keep_ratio makes it decide by itself'
                )
            return decisions[-1]
        if self.decider.keeps_all(learns=self.training):
            decision = keep_all(x[0].shape[0], hw, x[0].device, self.cell_size)
        else:
            check_half_size('RPN head', hw, tuple(x[1].shape[2:]), self.cell_size)
            cells_BNC = self.decider.cells(x[1], self.cell_size // 2)
            decision = self.decider.predict(cells_BNC, hw, self.cell_size)
        self.decider([decision])
        return decision

    def _sparse_level(self, x: Tensor, plan: Plan, level: int) -> tuple[Tensor, Tensor]:
        """Return scores and deltas of a level, for which dropped locations propose nothing."""
        if plan.gathers:
            return self._in_cells(x, plan, level)
        score, delta = self.forward_single(x)
        size = plan.decision.cell_size >> level
        mask = cell_mask(plan.decision.mask, tuple(x.shape[2:]), size).to(score.dtype)
        if not self.training:
            return score.masked_fill(mask == 0, -torch.inf), delta * mask
        return score * mask + DROPPED_LOGIT * (1 - mask), delta * mask

    def _in_cells(self, x: Tensor, plan: Plan, level: int) -> tuple[Tensor, Tensor]:
        batch, hw = x.shape[0], tuple(x.shape[2:])
        anchors, outs = self.rpn_cls.out_channels, self.rpn_reg.out_channels
        cells = kept_cells(plan, x, level)
        tiles = cells.tiles_of_map(x)
        with region('slow path'):
            tiles = F.relu(convolve(tiles, self.rpn_conv, halo=1))
            kept = [tile_rows(part(tiles)) for part in (self.rpn_cls, self.rpn_reg)]
        with region('scatter'):
            # Of the convolution's dtype, which autocast may have chosen.
            table = kept[0].new_zeros(batch * hw[0] * hw[1] + 2, anchors + outs)
            table[:, :anchors] = -torch.inf
            put_rows(table, cells.rows.inner, torch.cat(kept, dim=1))
        score, delta = table_map(table, batch, hw).split((anchors, outs), dim=1)
        return score, delta

    def loss_by_feat(self, cls_scores: list[Tensor], *args, **kwargs) -> dict:
        """Return the losses; in eval mode dropped locations count as they do in training."""
        scores = [score.masked_fill(score == -torch.inf, DROPPED_LOGIT) for score in cls_scores]
        return super().loss_by_feat(scores, *args, **kwargs)

    def _bbox_post_process(self, results: InstanceData, *args, **kwargs) -> InstanceData:
        """Leave out what dropped locations would propose, then go on as ``RPNHead``."""
        if self.decider is not None:
            scores = results.scores
            # Float16 and bfloat16 round a score by up to 0.4%.
            dropped = scores.new_tensor(DROPPED_LOGIT if self.training else -torch.inf).sigmoid()
            results = results[~scores.isclose(dropped, rtol=5e-3, atol=0)]
        return super()._bbox_post_process(results, *args, **kwargs)
