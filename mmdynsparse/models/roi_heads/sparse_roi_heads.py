"""RoI heads that look at kept proposals only.

Source: ``StandardRoIHead`` and ``CascadeRoIHead`` of mmdetection 3.x (Ren et al., arXiv 1506.01497;
He et al., arXiv 1703.06870; Cai and Vasconcelos, arXiv 1712.00726), whose arguments and state-dict
names they have. What is sparse is our own: proposals are locations too.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from mmcv.ops import RoIAlign
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.models.test_time_augs import merge_aug_masks
from mmdet.structures.bbox import bbox2roi, get_box_tensor
from mmengine.structures import InstanceData
from torch import Tensor, nn

from ...ops import keep_all, plain_float32, roi_align
from ...registry import MODELS
from ..decider import Decider
from ..regions import decide_regions
from ..sparsity import RegionSparsity
from .sparse_fcn_mask_head import SparseFCNMaskHead


class _SparseRoIHead:
    """What both RoI heads add to mmdet's.

    Attributes:
        kept_boxes: For pictures: boxes of the kept proposals of each image of the last forward,
            (N, 4) in px. Empty if there was nothing to choose from.
    """

    def __init__(self, sparsity: Mapping | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        self.decider = None if sparsity is None else Decider(RegionSparsity.from_cfg(sparsity))
        self.kept_boxes: list[Tensor] = []
        for part in (self.bbox_roi_extractor, getattr(self, 'mask_roi_extractor', None)):
            for extractor in _modules(part):
                layers = extractor.roi_layers
                extractor.roi_layers = nn.ModuleList(map(_with_products, layers))

    def forward(
        self, x: Sequence[Tensor], rpn_results_list: list[InstanceData], *args, **kwargs
    ) -> tuple:
        """Return raw outputs for kept proposals, as mmdet's RoI head does for all."""
        return super().forward(x, self._kept(rpn_results_list), *args, **kwargs)

    def predict(
        self, x: Sequence[Tensor], rpn_results_list: list[InstanceData], *args, **kwargs
    ) -> list[InstanceData]:
        """Return the detections among kept proposals.

        Raises:
            ValueError: If proposals have no scores by which some could be kept.
        """
        return super().predict(x, self._kept(rpn_results_list), *args, **kwargs)

    def loss(self, x: Sequence[Tensor], rpn_results_list: list[InstanceData], *args) -> dict:
        """Return the losses of mmdet's RoI head, for which all proposals are kept."""
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
            stages.append(head(feats, scores, labels).split(counts))
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
        self.kept_boxes = []
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
        kept = [found[mask] for found, mask in zip(proposals, masks, strict=True)]
        self.kept_boxes = [get_box_tensor(found.bboxes).detach() for found in kept]
        return kept


class _RoIAlign(RoIAlign):
    """mmcv's layer, which at inference on a CPU in float32 is computed by matrix products."""

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        if input.dtype == torch.bfloat16:  # for which mmcv has no kernel
            return self.forward(input.float(), rois.float()).to(input.dtype)
        if not plain_float32(input):
            return super().forward(input, rois)
        args = (self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)
        return roi_align(input, rois, *args)


def _with_products(layer: nn.Module) -> nn.Module:
    """Return the layer that takes the place of a layer of a RoI extractor."""
    if type(layer) is not RoIAlign or layer.pool_mode != 'avg':
        return layer
    args = (layer.output_size, layer.spatial_scale, layer.sampling_ratio, layer.pool_mode)
    return _RoIAlign(*args, layer.aligned, layer.use_torchvision)


def _modules(part: nn.Module | None) -> list[nn.Module]:
    """Return the modules of all stages of a part, one where there are no stages."""
    if part is None:
        return []
    return list(part) if isinstance(part, nn.ModuleList) else [part]


@MODELS.register_module()
class SparseStandardRoIHead(_SparseRoIHead, StandardRoIHead):
    """RoI head of Faster and Mask R-CNN that looks at kept proposals only.

    At inference the best proposals of each image are kept, by their objectness; the others cost
    neither RoIAlign nor box head. Nothing is trained for it, and training samples from all
    proposals, as mmdet's does. A ``SparseFCNMaskHead`` gets the scores of the detections, and
    computes the masks of their own classes alone.

    At inference on a CPU in float32 RoIAlign is two matrix products for each region, with mmcv's
    values (:func:`mmdynsparse.ops.roi_align`).

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
