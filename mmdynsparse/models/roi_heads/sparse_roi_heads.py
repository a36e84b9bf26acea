"""RoI heads that look at kept proposals only.

Source: ``StandardRoIHead`` and ``CascadeRoIHead`` of mmdetection 3.x (Ren et al., arXiv 1506.01497;
He et al., arXiv 1703.06870; Cai and Vasconcelos, arXiv 1712.00726), whose arguments and state-dict
names they have. What is sparse is our own: proposals are locations too.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from mmcv.ops import RoIAlign
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.models.test_time_augs import merge_aug_masks
from mmdet.structures.bbox import bbox2roi
from mmengine.structures import InstanceData
from torch import Tensor, nn

from ...ops import keep_all
from ...registry import MODELS
from ..decider import Decider
from ..regions import decide_regions
from ..sparsity import RegionSparsity
from .sparse_fcn_mask_head import SparseFCNMaskHead


class _SparseRoIHead:
    """What both RoI heads add to mmdet's."""

    def __init__(self, sparsity: Mapping | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        self.decider = None if sparsity is None else Decider(RegionSparsity.from_cfg(sparsity))

    def forward(
        self, x: Sequence[Tensor], rpn_results_list: list[InstanceData], *args, **kwargs
    ) -> tuple:
        """Return raw outputs for kept proposals, as mmdet's RoI head does for all."""
        self._choose_roi_align(x)
        return super().forward(x, self._kept(rpn_results_list), *args, **kwargs)

    def predict(
        self, x: Sequence[Tensor], rpn_results_list: list[InstanceData], *args, **kwargs
    ) -> list[InstanceData]:
        """Return the detections among kept proposals.

        Raises:
            ValueError: If proposals have no scores by which some could be kept.
        """
        self._choose_roi_align(x)
        return super().predict(x, self._kept(rpn_results_list), *args, **kwargs)

    def loss(self, x: Sequence[Tensor], rpn_results_list: list[InstanceData], *args) -> dict:
        """Return the losses of mmdet's RoI head, for which all proposals are kept."""
        self._choose_roi_align(x)
        count = sum(map(len, rpn_results_list))
        if self.decider is not None and count:
            self.decider([keep_all(1, (1, count), x[0].device)])
        return super().loss(x, rpn_results_list, *args)

    def predict_mask(
        self,
        x: Sequence[Tensor],
        batch_img_metas: list[dict],
        results_list: list[InstanceData],
        rescale: bool = False,
    ) -> list[InstanceData]:
        """Add masks to the detections, the mean over the stages of a cascade."""
        heads = _modules(self.mask_head)
        sparse = all(isinstance(head, SparseFCNMaskHead) for head in heads)
        if not sparse or not any(map(len, results_list)):
            return super().predict_mask(x, batch_img_metas, results_list, rescale)
        rois = bbox2roi([results.bboxes for results in results_list])
        labels = torch.cat([results.labels for results in results_list])
        scores, counts = [results.scores for results in results_list], [*map(len, results_list)]
        stages = []  # of each the logits (N_i, 1, H, W) of the images
        for head, extractor in zip(heads, _modules(self.mask_roi_extractor), strict=True):
            feats = extractor(x[: extractor.num_inputs], rois)
            feats = self.shared_head(feats) if self.with_shared_head else feats
            stages.append(head.class_logits(feats, scores, labels).split(counts))
        several = len(stages) > 1
        masks = stages[0]
        if several:
            images = zip(zip(*stages, strict=True), batch_img_metas, strict=True)
            masks = [merge_aug_masks([m.sigmoid() for m in parts], meta) for parts, meta in images]
        return heads[-1].predict_by_feat(
            mask_preds=masks,
            results_list=results_list,
            batch_img_metas=batch_img_metas,
            rcnn_test_cfg=self.test_cfg,
            rescale=rescale,
            activate_map=several,
        )

    def _kept(self, proposals: list[InstanceData]) -> list[InstanceData]:
        """Return the kept proposals of each image, in the order that they had."""
        if self.decider is None or not any(map(len, proposals)):
            return proposals
        if not all('scores' in found for found in proposals):
            raise ValueError(
                'sparsity of a RoI head needs proposals with scores, as those of an RPN, '
                f'got {proposals[0].keys()}'
            )
        decision = decide_regions(self.decider, [found.scores for found in proposals])
        self.decider([decision])
        masks = decision.mask[0].bool().split([*map(len, proposals)])
        return [found[mask] for found, mask in zip(proposals, masks, strict=True)]

    def _choose_roi_align(self, x: Sequence[Tensor]) -> None:
        """Let mmcv's layers call the RoIAlign that is faster on the device, with equal values."""
        extractors = [self.bbox_roi_extractor]
        if self.with_mask:
            extractors.append(self.mask_roi_extractor)
        for extractor in (e for several in extractors for e in _modules(several)):
            for layer in extractor.roi_layers:
                if isinstance(layer, RoIAlign) and layer.pool_mode == 'avg':
                    layer.use_torchvision = x[0].device.type == 'cpu'


def _modules(part: nn.Module) -> Iterable[nn.Module]:
    """Return the modules of all stages of a part, one where there are no stages."""
    return list(part) if isinstance(part, nn.ModuleList) else [part]


@MODELS.register_module()
class SparseStandardRoIHead(_SparseRoIHead, StandardRoIHead):
    """RoI head of Faster and Mask R-CNN that looks at kept proposals only.

    At inference the best proposals of each image are kept, by their objectness; the others cost
    neither RoIAlign nor box head. Nothing is trained for it, and training samples from all
    proposals, as mmdet's does. A ``SparseFCNMaskHead`` gets the scores of the detections, and
    computes the masks of their own classes alone.

    On a CPU features are extracted by torchvision's RoIAlign, whose values are those of mmcv's.

    Args:
        sparsity: Arguments of :class:`~mmdynsparse.models.sparsity.RegionSparsity`, for the
            proposals. None keeps all. Defaults to None.
        **kwargs: Arguments of mmdet's ``StandardRoIHead``.

    Raises:
        ValueError: If ``sparsity`` is not valid; in a forward, if proposals have no scores.
    """

    original: ClassVar[str] = 'StandardRoIHead'


@MODELS.register_module()
class SparseCascadeRoIHead(_SparseRoIHead, CascadeRoIHead):
    """RoI head of Cascade R-CNN, of whose proposals all stages look at the kept ones only.

    See :class:`SparseStandardRoIHead`.

    Args:
        sparsity: As of :class:`SparseStandardRoIHead`.
        **kwargs: Arguments of mmdet's ``CascadeRoIHead``.
    """

    original: ClassVar[str] = 'CascadeRoIHead'
