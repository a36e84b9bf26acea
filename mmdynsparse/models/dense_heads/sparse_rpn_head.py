"""RPN head that looks for objects in kept cells of the two finest levels.

Source: Ren et al., *Faster R-CNN* (arXiv 1506.01497), as ``RPNHead`` of mmdetection 3.x, whose
arguments and state-dict names it has; see ``cell_head`` for what is sparse.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from mmdet.models.dense_heads import RPNHead
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor, nn

from ...layers.cell_conv import check_half_size
from ...layers.cell_stack import Branch
from ...ops import Decision, keep_all
from ...registry import MODELS
from ..sparsity import CellSparsity
from .cell_head import DROPPED_LOGIT, CellHead


@MODELS.register_module()
class SparseRPNHead(CellHead, RPNHead):
    """RPN head that computes kept cells of the two finest levels.

    A location that is not kept proposes nothing on its level. One decision is made for both levels.
    On a CPU the NMS leaves out boxes that are too bad to be proposed, with the proposals that
    mmdet's head has.

    Args:
        sparsity: ``dict()`` for the decision that the features of a ``SparseFPN`` carry; or
            arguments of
            :class:`~mmdynsparse.models.sparsity.CellSparsity` for a decision of the head's own,
            by default with a ``mmdynsparse.CellPredictor`` on the second level. None is the
            dense head. Defaults to None.
        **kwargs: Arguments of mmdet's ``RPNHead``.

    Raises:
        ValueError: If ``sparsity`` is not valid, or with it the class scores are not sigmoids; in
            a forward, if the features carry no decision that is needed.
    """

    original: ClassVar[str] = 'RPNHead'
    part: ClassVar[str] = 'RPN head'
    sparsity_type: ClassVar[type] = CellSparsity

    def __init__(self, sparsity: Mapping | None = None, **kwargs) -> None:
        if isinstance(sparsity, Mapping) and sparsity:
            sparsity = {'predictor': dict(type='mmdynsparse.CellPredictor'), **sparsity}
            if sparsity['predictor'] is None:
                raise ValueError('sparsity.predictor must be a config in an RPN head, got None')
        super().__init__(sparsity=sparsity, **kwargs)

    def branches(self) -> list[Branch]:
        """Return the only branch."""
        several = isinstance(self.rpn_conv, nn.Sequential)
        convs = list(self.rpn_conv) if several else [self.rpn_conv]
        return [Branch(convs, [self.rpn_cls, self.rpn_reg])]

    def _decide(
        self, level: int, x: Sequence[Tensor], coarse: Tensor | None, before: list[Decision]
    ) -> Decision:
        if before:
            return before[-1]
        if not self.decider.keep_ratios:
            return self._decision_of_neck(x)
        hw = tuple(x[0].shape[2:])
        if self.decider.keeps_all(learns=self.training):
            return keep_all(x[0].shape[0], hw, x[0].device, self.cell_size)
        check_half_size(self.part, hw, tuple(x[1].shape[2:]), self.cell_size)
        cells_BNC = self.decider.cells(x[1], self.cell_size // 2)
        return self.decider.predict(cells_BNC, hw, self.cell_size)

    def _bbox_post_process(
        self, results: InstanceData, cfg: ConfigDict, *args, **kwargs
    ) -> InstanceData:
        """Leave out what dropped locations would propose, then go on as ``RPNHead``."""
        if self.decider is not None:
            scores = results.scores
            # Float16 and bfloat16 round a score by up to 0.4%.
            dropped = scores.new_tensor(DROPPED_LOGIT if self.training else -torch.inf).sigmoid()
            results = results[~scores.isclose(dropped, rtol=5e-3, atol=0)]
        plain = cfg.nms.get('type', 'nms') == 'nms' and cfg.max_per_img > 0
        if plain and results.scores.is_cpu:
            return self._nms_of_the_best(results, cfg, *args, **kwargs)
        return super()._bbox_post_process(results, cfg, *args, **kwargs)

    def _nms_of_the_best(
        self, results: InstanceData, cfg: ConfigDict, *args, **kwargs
    ) -> InstanceData:
        """Do the NMS of no more boxes than it takes, on each level by itself.

        No box suppresses one of a higher score, so what is best after the NMS of the best boxes is
        best after that of all. Time goes with the square of the number of boxes.
        """
        # The number of boxes from which on mmcv takes the levels one by one.
        cfg = ConfigDict({**cfg, 'nms': {**cfg.nms, 'split_thr': 1}})
        results = results[results.scores.argsort(descending=True)]
        # Under autocast they are of half precision, which mmcv's NMS does not take on a CPU.
        results.bboxes = results.bboxes.to(torch.float32)
        results.scores = results.scores.to(torch.float32)
        count = 2 * cfg.max_per_img
        while True:
            best = super()._bbox_post_process(results[:count], cfg, *args, **kwargs)
            if len(best) == cfg.max_per_img or count >= len(results):
                return best
            count *= 2
