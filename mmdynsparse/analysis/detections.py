"""How many objects a detector finds, and a number of them that does not depend on its weights.

What a two-stage detector costs depends on its detections, and random weights find none.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from mmengine.structures import InstanceData
from torch import nn

from ..models.calls import replaced_methods

SHORTEST = 16.0  # px, sides of boxes
LONGEST = 0.8  # of the image's shorter side
SCORES = (0.95, 0.05)


@contextmanager
def fixed_detections(models: Sequence[nn.Module], count: int | None, seed: int) -> Iterator[None]:
    """Let RoI heads find a number of boxes in each image, the same ones in every model.

    The boxes take the place of the detections, after NMS and before masks. Their sides are
    distributed log-uniformly from 16 px to 0.8 times the image's shorter side, their scores fall
    evenly from 0.95 to 0.05.

    Args:
        models: Two-stage detectors. Afterwards they are as they were.
        count: Boxes of an image; None leaves the models as they are.
        seed: Of the boxes.

    Raises:
        ValueError: If a model has no RoI head.
    """
    if count is None:
        yield
        return
    if not all(has_roi_head(model) for model in models):
        raise ValueError(f'--detections needs a two-stage detector, got {count} for another model')
    heads = [model.roi_head for model in models]
    with replaced_methods({head: _finding(head, count, seed) for head in heads}, 'predict_bbox'):
        yield


def has_roi_head(model: nn.Module) -> bool:
    """Whether a model is a detector of two stages."""
    return hasattr(model, 'rpn_head') and hasattr(model, 'roi_head')


def mean_detections(outputs: object) -> float | None:
    """Return the detections of an image, the mean, or None if the outputs are of no detector."""
    if not isinstance(outputs, list | tuple):
        return None
    found = [getattr(output, 'pred_instances', output) for output in outputs]
    if not found or not all(isinstance(f, InstanceData) and 'bboxes' in f for f in found):
        return None
    return sum(map(len, found)) / len(found)


def _finding(head: nn.Module, count: int, seed: int) -> Callable:
    """Return a RoI head's ``predict_bbox`` with other boxes in the end."""
    predict, last = head.predict_bbox, head.bbox_head
    last = last[-1] if isinstance(last, nn.ModuleList) else last

    def predict_bbox(
        x: Sequence, metas: Sequence[dict], proposals: list, *args, **kwargs
    ) -> list[InstanceData]:
        predict(x, metas, proposals, *args, **kwargs)
        boxes = [_boxes(meta['img_shape'], count, last.num_classes, seed) for meta in metas]
        return [found.to(x[0].device) for found in boxes]

    return predict_bbox


def _boxes(hw: tuple[int, int], count: int, num_classes: int, seed: int) -> InstanceData:
    random = torch.Generator().manual_seed(seed)
    wh = torch.tensor([hw[1], hw[0]], dtype=torch.float32)
    shortest = min(SHORTEST, LONGEST * min(hw))
    sides = torch.rand(count, 2, generator=random)
    sides = (sides * math.log(LONGEST * min(hw) / shortest)).exp() * shortest
    corners = torch.rand(count, 2, generator=random) * (wh - sides)
    return InstanceData(
        bboxes=torch.cat((corners, corners + sides), 1),
        scores=torch.linspace(*SCORES, count),
        labels=torch.randint(num_classes, (count,), generator=random),
    )
