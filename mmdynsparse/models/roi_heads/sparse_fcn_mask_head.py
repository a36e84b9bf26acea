"""Mask head that computes kept regions at full resolution, the others at half of it.

Source: He et al., *Mask R-CNN* (arXiv 1703.06870), as ``FCNMaskHead`` of mmdetection 3.x, whose
arguments and state-dict names it has. What is sparse is our own, after Rao et al. (T-PAMI 2023,
arXiv 2207.01580). Dimension letters: N regions, C channels, K classes, P positions of a region.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks.wrappers import Conv2d, ConvTranspose2d
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmengine.logging import print_log
from torch import Tensor, nn

from ...layers.cell_conv import channels_last
from ...layers.conv_module import conv_module
from ...layers.plain import is_plain
from ...ops import Plan, linear, plain_inference, put_rows, region
from ...registry import MODELS
from ..decider import Decider
from ..regions import decide_regions
from ..sparsity import RegionSparsity


@MODELS.register_module()
class SparseFCNMaskHead(FCNMaskHead):
    """Mask head whose convolutions run at 14 x 14 for kept regions, at 7 x 7 for the others.

    The fast path has no weights of its own: a region's features are averaged to half their size,
    rounded up, take the same convolutions, and are enlarged before the layers that end the head.
    At inference a sparse RoI head (``SparseStandardRoIHead``) hands over the scores of the
    detections, and the best of each image are kept. In training regions have no scores: random ones
    are kept, and so both paths learn from regions of any kind.

    Args:
        sparsity: Arguments of :class:`~mmdynsparse.models.sparsity.RegionSparsity`. None is the
            dense head. Defaults to None.
        **kwargs: Arguments of mmdet's ``FCNMaskHead``.

    Raises:
        ValueError: If ``sparsity`` is not valid, or with it ``num_convs`` is 0.
    """

    original: ClassVar[str] = 'FCNMaskHead'

    def __init__(self, sparsity: Mapping | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        self.decider = None
        self._warned = False
        if sparsity is None:
            return
        if self.num_convs < 1:
            raise ValueError(
                f'num_convs must be at least 1 in a sparse mask head, got {self.num_convs}'
            )
        self.decider = Decider(RegionSparsity.from_cfg(sparsity))

    def forward(
        self, x: Tensor, scores: Sequence[Tensor] | None = None, labels_N: Tensor | None = None
    ) -> Tensor:
        """Return mask logits.

        Args:
            x: Features of the regions, (N, C, H, W).
            scores: Scores of the regions of each image, (N_i,). Defaults to None: in eval mode
                all regions then take the slow path.
            labels_N: Class of each region. Defaults to None, the logits of all classes.

        Returns:
            (N, K, H', W'), of the sides that mmdet's head has; (N, 1, H', W') with ``labels_N``.
        """
        x = self._features(x, scores)
        if labels_N is not None and self.class_agnostic:
            labels_N = torch.zeros_like(labels_N)
        if labels_N is not None and self._ends_in_blocks:
            return self._blocks(x, labels_N)
        if self.upsample is not None:
            x = self.upsample(x)
            if self.upsample_method == 'deconv':
                x = self.relu(x)
        logits = self.conv_logits(x)
        if labels_N is None:
            return logits
        return logits[torch.arange(len(logits), device=x.device), labels_N][:, None]

    @property
    def _ends_in_blocks(self) -> bool:
        """Whether the last layers give each position a block of the mask that is its alone."""
        up = self.upsample
        if up is None or not is_plain(up, nn.ConvTranspose2d, ConvTranspose2d):
            return False
        no_overlap = up.kernel_size == up.stride and up.padding == up.output_padding == (0, 0)
        return no_overlap and is_plain(self.conv_logits, nn.Conv2d, Conv2d)

    def _blocks(self, x: Tensor, labels_N: Tensor) -> Tensor:
        """Upsample by a linear layer, then multiply by the weights of one class.

        Blocks do not overlap, so the deconvolution is a linear layer with s x s times the channels.
        """
        (n, channels, h, w), (s, t) = x.shape, self.upsample.stride
        weight, bias = self.upsample.weight, self.upsample.bias
        weight = weight.permute(2, 3, 1, 0).reshape(-1, channels)
        bias = None if bias is None else bias.repeat(s * t)
        x_NPC = linear(x.permute(0, 2, 3, 1).reshape(-1, channels), weight, bias)
        x_NPC = x_NPC.relu_().view(n, h * w * s * t, self.conv_out_channels)
        class_NC1 = self.conv_logits.weight[labels_N, :, 0]
        out = torch.bmm(x_NPC, class_NC1)
        if self.conv_logits.bias is not None:
            out = out + self.conv_logits.bias[labels_N, None, None]
        out = out.view(n, h, w, s, t).transpose(2, 3)
        return out.reshape(n, 1, h * s, w * t)

    def _features(self, x: Tensor, scores: Sequence[Tensor] | None) -> Tensor:
        """Return what the convolutions make of the regions, (N, C', H, W)."""
        if plain_inference(x):
            x = channels_last(x)
        if self.decider is None or self.decider.keeps_all() or len(x) == 0:
            return self._convs(x)
        if self.training:
            scores = [torch.rand(len(x), device=x.device)]
        elif scores is None:
            self._warn_of_no_scores()
            return self._convs(x)
        decision = decide_regions(self.decider, scores)
        self.decider([decision])
        plan = self.decider.plan(decision)
        return self._gathered(x, plan) if plan.gathers else self._everywhere(x, plan)

    def _gathered(self, x: Tensor, plan: Plan) -> Tensor:
        n, _, h, w = x.shape
        table, out = x.permute(0, 2, 3, 1).flatten(1), None
        paths = ('slow path', self._convs, plan.kept), ('fast path', self._light, plan.dropped)
        for name, path, rows in paths:
            if len(rows) == 0:
                continue
            with region('gather'):
                part = table.index_select(0, rows).view(-1, h, w, x.shape[1]).permute(0, 3, 1, 2)
            with region(name):
                part = path(part).permute(0, 2, 3, 1).flatten(1)
            with region('scatter'):
                out = part.new_empty(n, part.shape[1]) if out is None else out
                put_rows(out, rows, part)
        return out.view(n, h, w, -1).permute(0, 3, 1, 2)

    def _everywhere(self, x: Tensor, plan: Plan) -> Tensor:
        slow, fast = self._convs(x), self._light(x)
        mask = plan.decision.mask.view(-1, 1, 1, 1).to(slow.dtype)
        return torch.lerp(fast, slow, mask)

    def _convs(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv_module(conv, x)
        return x

    def _light(self, x: Tensor) -> Tensor:
        """Take the convolutions at half the resolution."""
        half = [(side + 1) // 2 for side in x.shape[2:]]
        out = self._convs(F.adaptive_avg_pool2d(x, half))
        return F.interpolate(out, x.shape[2:], mode='bilinear', align_corners=False)

    def _predict_by_feat_single(self, mask_preds: Tensor, *args, **kwargs) -> Tensor:
        """Paste masks that are of all classes, or of each region's own alone."""
        if mask_preds.shape[1] == 1 and not self.class_agnostic:
            kwargs['labels'] = torch.zeros_like(kwargs['labels'])
        return super()._predict_by_feat_single(mask_preds, *args, **kwargs)

    def _warn_of_no_scores(self) -> None:
        if not self._warned:
            self._warned = True
            print_log(
                'A sparse mask head got no scores and computes every region at full resolution: '
                "its RoI head must be a 'mmdynsparse.SparseStandardRoIHead' or "
                "'mmdynsparse.SparseCascadeRoIHead'.",
                logger='current',
                level=logging.WARNING,
            )
