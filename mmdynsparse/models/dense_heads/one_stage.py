"""Heads of one-stage detectors that look for objects in kept cells of the two finest levels.

Sources: Lin et al., *RetinaNet* (arXiv 1708.02002); Tian et al., *FCOS* (arXiv 1904.01355); Zhang
et al., *ATSS* (arXiv 1912.02424); Li et al., *Generalized Focal Loss* (arXiv 2006.04388), as the
heads of mmdetection 3.x, whose arguments, state-dict names, anchors and targets they have; see
``cell_head`` for what is sparse.
"""

from typing import ClassVar

from mmdet.models.dense_heads import ATSSHead, FCOSHead, GFLHead, RetinaHead
from torch import Tensor

from ...layers.cell_stack import Branch
from ...registry import MODELS
from .cell_head import CellHead


@MODELS.register_module()
class SparseRetinaHead(CellHead, RetinaHead):
    """RetinaNet head that computes kept cells of the two finest levels.

    ``sparsity`` is that of :class:`~.cell_head.CellHead`; other arguments are mmdet's.
    """

    original: ClassVar[str] = 'RetinaHead'
    part: ClassVar[str] = 'RetinaNet head'

    def branches(self) -> list[Branch]:
        """Return the branches of classes and boxes."""
        return [
            Branch(self.cls_convs, [self.retina_cls]),
            Branch(self.reg_convs, [self.retina_reg]),
        ]


@MODELS.register_module()
class SparseFCOSHead(CellHead, FCOSHead):
    """FCOS head that computes kept cells of the two finest levels.

    ``sparsity`` is that of :class:`~.cell_head.CellHead`; other arguments are mmdet's.
    """

    original: ClassVar[str] = 'FCOSHead'
    part: ClassVar[str] = 'FCOS head'

    def branches(self) -> list[Branch]:
        """Return the branches of classes and boxes; either may predict the centerness."""
        classes, boxes = [self.conv_cls], [self.conv_reg]
        (boxes if self.centerness_on_reg else classes).append(self.conv_centerness)
        return [Branch(self.cls_convs, classes), Branch(self.reg_convs, boxes)]

    def finish(self, level: int, outs: list[Tensor]) -> tuple[Tensor, ...]:
        """Return class scores, distances to the sides of a box (px or strides), centerness."""
        scores, *rest = outs
        boxes, centerness = rest if self.centerness_on_reg else reversed(rest)
        boxes = self.scales[level](boxes).float()
        if not self.norm_on_bbox:
            return scores, boxes.exp(), centerness
        boxes = boxes.clamp(min=0)
        return scores, boxes if self.training else boxes * self.strides[level], centerness


@MODELS.register_module()
class SparseATSSHead(CellHead, ATSSHead):
    """ATSS head that computes kept cells of the two finest levels.

    ``sparsity`` is that of :class:`~.cell_head.CellHead`; other arguments are mmdet's.
    """

    original: ClassVar[str] = 'ATSSHead'
    part: ClassVar[str] = 'ATSS head'

    def branches(self) -> list[Branch]:
        """Return the branches of classes, and of boxes with their centerness."""
        return [
            Branch(self.cls_convs, [self.atss_cls]),
            Branch(self.reg_convs, [self.atss_reg, self.atss_centerness]),
        ]

    def finish(self, level: int, outs: list[Tensor]) -> tuple[Tensor, ...]:
        """Return class scores, box deltas and centerness."""
        scores, boxes, centerness = outs
        return scores, self.scales[level](boxes).float(), centerness


@MODELS.register_module()
class SparseGFLHead(CellHead, GFLHead):
    """GFL head that computes kept cells of the two finest levels.

    ``sparsity`` is that of :class:`~.cell_head.CellHead`; other arguments are mmdet's.
    """

    original: ClassVar[str] = 'GFLHead'
    part: ClassVar[str] = 'GFL head'

    def branches(self) -> list[Branch]:
        """Return the branches of classes and boxes."""
        return [Branch(self.cls_convs, [self.gfl_cls]), Branch(self.reg_convs, [self.gfl_reg])]

    def finish(self, level: int, outs: list[Tensor]) -> tuple[Tensor, ...]:
        """Return class scores, and distributions of the distances to the sides of a box."""
        scores, boxes = outs
        return scores, self.scales[level](boxes).float()
