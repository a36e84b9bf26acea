"""Fixed numbers of detections, and how many a model makes."""

import pytest
import torch
from mmengine.structures import InstanceData
from torch import nn

from mmdynsparse.analysis.detections import fixed_detections, mean_detections


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.bbox_head = nn.Identity()
        self.bbox_head.num_classes = 3
        self.calls = 0

    def predict_bbox(self, x, metas, proposals, rcnn_test_cfg=None, rescale=False):
        self.calls += 1
        return []


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.rpn_head, self.roi_head = nn.Identity(), Head()

    def find(self):
        metas = [dict(img_shape=(40, 60)), dict(img_shape=(200, 300))]
        return self.roi_head.predict_bbox([torch.zeros(2, 1, 4, 4)], metas, [], rescale=True)


def test_models_find_the_same_boxes_within_the_image():
    one, other = Detector(), Detector()
    with fixed_detections([one, other], 50, seed=1):
        found, again = one.find(), other.find()
    for result, expected, (h, w) in zip(found, again, ((40, 60), (200, 300)), strict=True):
        assert len(result) == 50
        assert result.bboxes.equal(expected.bboxes) and result.labels.equal(expected.labels)
        low, high = result.bboxes[:, :2], result.bboxes[:, 2:]
        assert (low >= 0).all() and (high > low).all() and (high <= torch.tensor([w, h])).all()
        assert result.labels.max() == 2 and (result.scores.diff() < 0).all()
    assert one.roi_head.calls == 1  # its cost is part of what is measured
    assert one.find() == []


def test_no_number_leaves_the_model_as_it_is():
    model = Detector()
    with fixed_detections([model], None, seed=0):
        assert model.find() == []


def test_only_roi_heads_can_find_a_fixed_number():
    with (
        pytest.raises(ValueError, match='--detections needs a two-stage detector'),
        fixed_detections([nn.Linear(1, 1)], 10, seed=0),
    ):
        pass


def test_mean_detections():
    found = [InstanceData(bboxes=torch.zeros(n, 4)) for n in (2, 5)]
    assert mean_detections(found) == 3.5
    assert mean_detections([torch.zeros(2)]) is None
    assert mean_detections(torch.zeros(2)) is None
    assert mean_detections([]) is None
