import pytest
import torch
from mmengine.structures import PixelData
from torch import nn

from mmdynsparse.engine.distillation import (
    ROI,
    ROI_INPUT,
    Batch,
    content_mask,
    feature_loss,
    find_module,
    hard_cross_entropy,
    kept_mask,
    kl_divergence,
    label_mask,
    mean_over_images,
    mean_over_rois,
    run_parts,
    second_stage,
)
from mmdynsparse.models.calls import Call, CallRecorder
from mmdynsparse.models.features import Features
from mmdynsparse.ops import Decision


class Sample:
    """A data sample with the size of its image and labels."""

    def __init__(self, img_shape=None, labels=None):
        self.metainfo = {} if img_shape is None else dict(img_shape=img_shape)
        self.gt_sem_seg = None if labels is None else PixelData(data=labels)


def test_kl_is_that_of_the_distributions():
    student, teacher = torch.randn(2, 2, 5, 3, 4)
    expected = torch.distributions.kl_divergence(
        *(torch.distributions.Categorical(logits=x.movedim(1, -1)) for x in (teacher, student))
    )
    torch.testing.assert_close(kl_divergence(student, teacher, 1.0, False), expected)
    assert kl_divergence(student, student, 2.0, False).abs().max() < 1e-6
    scaled = kl_divergence(4 * student, 4 * teacher, 4.0, False)
    torch.testing.assert_close(scaled, 16 * expected)


def test_kl_of_independent_classes():
    student, teacher = torch.randn(2, 3, 2, 6)
    bernoulli = [torch.distributions.Bernoulli(logits=x / 2) for x in (teacher, student)]
    expected = 4 * torch.distributions.kl_divergence(*bernoulli).sum(1)
    torch.testing.assert_close(kl_divergence(student, teacher, 2.0, True), expected)


def test_hard_labels_are_the_decisions_of_the_teacher():
    student, teacher = torch.randn(2, 2, 5, 3, 4)
    log_p = student.log_softmax(1)
    expected = -log_p.gather(1, teacher.argmax(1, keepdim=True)).squeeze(1)
    torch.testing.assert_close(hard_cross_entropy(student, teacher, False), expected)
    # Of independent classes, those with a probability above a half.
    p = student.sigmoid()
    expected = -torch.where(teacher.sigmoid() > 0.5, p, 1 - p).log().sum(1)
    torch.testing.assert_close(hard_cross_entropy(student, teacher, True), expected)
    half = hard_cross_entropy(student.bfloat16(), teacher, False)
    assert half.dtype == torch.float32 and half.shape == (2, 3, 4)


def test_kl_is_float32_for_half_logits():
    student, teacher = torch.randn(2, 2, 3, 4, dtype=torch.bfloat16)
    assert kl_divergence(student, teacher, 1.0, False).dtype == torch.float32


def test_ignored_labels_are_left_out():
    labels = torch.zeros(1, 8, 8, dtype=torch.long)
    labels[:, :4] = 255
    mask = label_mask([Sample(labels=labels), Sample(labels=labels * 0)], (4, 2), 255)
    assert mask[0].tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]] and mask[1].min() == 1
    values = torch.randn(2, 4, 2)
    other = values.clone()
    other[0, :2] = 100
    assert torch.equal(mean_over_images(values, mask), mean_over_images(other, mask))
    nothing = mean_over_images(values, torch.zeros_like(mask))
    assert nothing == 0


def test_padding_is_left_out():
    samples = [Sample((64, 64)), Sample((33, 48)), Sample()]
    images = torch.zeros(3, 3, 64, 64)
    mask = content_mask(Batch(images, samples), (3, 7, 4, 4))
    assert [mask[i].sum().item() for i in range(3)] == [16, 9, 16]
    assert mask[1, 2, 2] == 1 and mask[1, 3, 2] == 0 and mask[1, 2, 3] == 0
    assert content_mask(Batch(images[:2]), (2, 7, 4, 4)).min() == 1


def test_means_do_not_depend_on_how_a_batch_is_split():
    values, weights = torch.rand(4, 3, 5), (torch.rand(4, 3, 5) > 0.5).float()
    halves = [mean_over_images(values[i : i + 2], weights[i : i + 2]) for i in (0, 2)]
    torch.testing.assert_close(mean_over_images(values, weights), sum(halves) / 2)
    rois, values = torch.zeros(7, 5), torch.rand(7)
    rois[:, 0] = torch.tensor([0, 0, 0, 1, 2, 2, 3])
    four, two = torch.zeros(4, 3, 8, 8), torch.zeros(2, 3, 8, 8)
    second = rois[4:] - torch.tensor([2.0, 0, 0, 0, 0])
    halves = [
        mean_over_rois(values[:4], Batch(two, (), rois[:4])),
        mean_over_rois(values[4:], Batch(two, (), second)),
    ]
    torch.testing.assert_close(mean_over_rois(values, Batch(four, (), rois)), sum(halves) / 2)
    assert mean_over_rois(values[:0], Batch(two, (), rois[:0])) == 0


def test_feature_loss():
    s, t = torch.randn(2, 2, 3, 4, 4)
    images = torch.zeros(2, 3, 16, 16)
    whole = Batch(images, [Sample((16, 16)), Sample((16, 16))])
    one = feature_loss('neck', s, t, whole)
    torch.testing.assert_close(one, (s - t).square().mean())
    tokens = torch.zeros(2, 5, 6), torch.ones(2, 5, 6)
    two = feature_loss('neck', [s, (tokens[0],)], (t, tokens[1]), whole)
    torch.testing.assert_close(two, (one + 1) / 2)
    s[1, :, 2:] = 100
    half = Batch(images, [Sample((16, 16)), Sample((8, 16))])
    torch.testing.assert_close(
        feature_loss('neck', s, t, half),
        ((s - t)[0].square().mean() + (s - t)[1, :, :2].square().mean()) / 2,
    )


def test_weights_of_maps():
    students, teachers = ([torch.randn(2, 3, n, n) for n in (4, 2)] for _ in range(2))
    batch = Batch(torch.zeros(2, 3, 16, 16))
    errors = [(s - t).square().mean() for s, t in zip(students, teachers, strict=True)]

    def loss(weight):
        return feature_loss('backbone', students, teachers, batch, weight)

    torch.testing.assert_close(loss(0.5), 0.5 * (errors[0] + errors[1]) / 2)
    torch.testing.assert_close(loss((2, 0.5)), 2 * errors[0] + 0.5 * errors[1])
    students[0].fill_(torch.inf)  # a map without weight has no part in the loss
    torch.testing.assert_close(loss([0, 0.5]), 0.5 * errors[1])
    for weight in ([0.5], (1.0, 1.0, 1.0)):
        with pytest.raises(ValueError, match=r"\['backbone'\] must have a weight for .* 2 maps"):
            loss(weight)


def decide(*rows, hw=(2, 2), **kwargs):
    """Return the decision for a map of 2 x 2, or cells of it, of each image."""
    mask = torch.tensor(rows, dtype=torch.float32, requires_grad=True)
    return Decision(mask, mask, hw, 0.5, **kwargs)


@pytest.mark.parametrize(
    'side, cell_size, kept',
    [
        (2, 1, [[1, 0], [1, 1]]),
        (4, 1, [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]),
        (1, 1, [[1]]),
        (3, 2, [[1, 1, 0], [1, 1, 0], [1, 1, 1]]),  # the last cells reach beyond the map
    ],
)
def test_locations_that_a_decision_keeps(side, cell_size, kept):
    hw = (2, 2) if cell_size == 1 else (3, 3)
    decision = decide([1, 0, 1, 1], hw=hw, cell_size=cell_size)
    assert kept_mask(decision, (side, side)).tolist() == [kept]


def test_dropped_locations_are_left_out():
    """Each map takes the last decision of its call; an image that keeps nothing counts 0."""
    s, t = torch.randn(2, 2, 3, 4, 4)
    error = (s - t).square().mean(1)
    first, last = decide([1, 1, 1, 1], [1, 1, 1, 1]), decide([1, 0, 0, 1], [0, 0, 0, 1])
    batch = Batch(torch.zeros(2, 3, 16, 16), [Sample((16, 16)), Sample((12, 16))])

    def loss(*decisions, weight=1.0):
        return feature_loss('backbone', [Features([s], decisions)], t, batch, weight, True)

    of_first = (error[0, :2, :2].mean() + error[0, 2:, 2:].mean()) / 2
    of_second = error[1, 2, 2:].mean()  # the row below is padding
    torch.testing.assert_close(loss(first, last), (of_first + of_second) / 2)
    torch.testing.assert_close(loss(first, last, weight=[0.5]), (of_first + of_second) / 4)
    assert loss(last, decide([0] * 4, [0] * 4)) == 0
    assert not loss(first, last).requires_grad  # the predictors learn nothing from it
    whole = feature_loss('backbone', s, t, batch)
    torch.testing.assert_close(loss(first), whole)
    torch.testing.assert_close(feature_loss('backbone', Features([s], [last]), t, batch), whole)
    for without in (s, Features([s.clone()])):
        with pytest.raises(ValueError, match=r"kept_only must be False in .*\['neck'\], whose"):
            feature_loss('neck', without, t, batch, kept_only=True)


@pytest.mark.parametrize('shape', [(4, 3, 7, 7), (4, 6)])
def test_features_of_regions(shape):
    """Every image counts alike, whatever its size and number of regions; nothing is padding."""
    s, t = torch.randn(2, *shape)
    rois = torch.zeros(4, 5)
    rois[3, 0] = 1
    batch = Batch(torch.zeros(2, 3, 16, 16), [Sample((16, 16)), Sample((4, 16))], rois)
    error = (s - t).square()
    torch.testing.assert_close(
        feature_loss('roi_head.bbox_roi_extractor', s, t, batch),
        (error[:3].mean() + error[3].mean()) / 2,
    )
    with pytest.raises(ValueError, match=r"one map for each of 4 regions, got 3 of 'roi_head.x'"):
        feature_loss('roi_head.x', s[:3], t[:3], batch)


@pytest.mark.parametrize('shape', [(1, 4, 8, 8), (1, 3, 4, 4)])
def test_maps_of_another_width_or_stride_are_refused(shape):
    with pytest.raises(ValueError, match=r"same width and stride.*'neck'.*\(3, 8, 8\)"):
        batch = Batch(torch.zeros(1, 3, 32, 32))
        feature_loss('neck', torch.zeros(1, 3, 8, 8), torch.zeros(shape), batch)


class Net(nn.Module):
    """A head that calls its own forward, as those of mmseg do."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Conv2d(3, 2, 1)
        self.decode_head = nn.Conv2d(2, 2, 1)


def test_only_the_parts_in_which_modules_lie_run():
    net, images = Net(), torch.randn(1, 3, 4, 4)
    recorder = CallRecorder({'decode_head': net.decode_head})
    assert not recorder.record(lambda: run_parts(net, images, ['backbone']))
    (call,) = recorder.record(lambda: run_parts(net, images, ['decode_head.conv']))
    torch.testing.assert_close(call.out, net.decode_head(net.backbone(images)))


def test_regions_of_the_loss_are_not_those_that_a_sampler_tried():
    """Nor those of a mask head that shares the extractor."""

    def call(name, value=0):
        return Call(name, ('maps', torch.full((1, 5), float(value))), value)

    sampling = [call(ROI_INPUT, 1), call(ROI, 1)]
    loss = [call(ROI_INPUT, 2), call('roi_head.shared_head', 2), call(ROI, 2)]
    others = [call('backbone'), call('rpn_head')]
    mask = [call(ROI_INPUT, 3)]
    calls, rois = second_stage([*others, *sampling, *sampling, *loss, *mask])
    assert calls == [*others, *loss, *mask]
    assert rois.unique().item() == 2


def test_a_module_that_does_not_exist():
    with pytest.raises(ValueError, match=r"name modules of Net \(in backbone, .*got 'necks.0'"):
        find_module(Net(), 'necks.0')
