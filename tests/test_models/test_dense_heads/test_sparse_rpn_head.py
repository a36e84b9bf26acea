"""SparseRPNHead against mmdet's RPNHead, alone and behind a SparseFPN."""

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import ConfigDict
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.structures import InstanceData

from mmdynsparse.models.features import Features
from mmdynsparse.ops import Decision

from .conftest import close, left_half, neck_maps, run

pytest.importorskip('mmdet')

ARGUMENTS = dict(
    in_channels=16,
    feat_channels=16,
    anchor_generator=dict(
        type='AnchorGenerator', scales=[8], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32]
    ),
    bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
    loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True),
    loss_bbox=dict(type='L1Loss'),
    train_cfg=ConfigDict(
        assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3),
        sampler=dict(type='RandomSampler', num=256, pos_fraction=0.5),
        allowed_border=-1,
        pos_weight=-1,
    ),
    test_cfg=ConfigDict(
        nms_pre=1000, max_per_img=1000, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0
    ),
)
META = dict(img_shape=(128, 128), pad_shape=(128, 128), scale_factor=(1.0, 1.0))


def maps(hw=(32, 32)):
    return neck_maps(4, hw)


def build(sparsity=None, kind='mmdynsparse.SparseRPNHead', **kwargs):
    torch.manual_seed(1)
    cfg = {**ARGUMENTS, **kwargs}
    if kind != 'RPNHead':
        cfg['sparsity'] = sparsity
    with MMENGINE_MODELS.switch_scope_and_registry('mmdet') as registry:
        head = registry.build(dict(type=kind, **cfg))
    for tensor in head.state_dict().values():
        tensor.add_(0.2 * torch.randn_like(tensor))
    return head.eval()


def dense_of(head):
    dense = build(kind='RPNHead')
    keys = dense.load_state_dict(head.state_dict(), strict=False)
    assert not keys.missing_keys
    assert all(key.startswith('decider.predictor.') for key in keys.unexpected_keys)
    return dense


def features(ratio=0.5):
    return Features(maps(), [left_half(ratio)])


@torch.no_grad()
def test_dense():
    """Without sparsity, or anything to drop, the head is mmdet's."""
    head = build()
    close(head(features()), dense_of(head)(maps()))
    head = build({})
    close(head(features(ratio=1.0)), dense_of(head)(maps()))
    head = build(dict(keep_ratio=1.0))
    close(head(maps()), dense_of(head)(maps()))


@pytest.mark.parametrize(
    'x', [maps(), Features(maps(), [features().decisions[0]._replace(hw=(16, 16), cell_size=4)])]
)
def test_features_without_a_decision_for_their_cells(x):
    with pytest.raises(ValueError, match='SparseFPN'):
        build({})(x)


@torch.no_grad()
def test_decision_of_the_neck():
    """Kept locations are dense, others propose nothing; both executions agree."""
    head = build({})
    gathered, masked = run(head, features()), run(head, features(), 'masked')
    close(gathered, masked)
    dense = dense_of(head)(maps())
    for level, (out, expected) in enumerate(zip(gathered[0], dense[0], strict=True)):
        if level > 1:
            torch.testing.assert_close(out, expected)
            continue
        half = out.shape[3] // 2
        torch.testing.assert_close(out[0, ..., :half], expected[0, ..., :half])
        assert out[0, ..., half:].eq(-torch.inf).all() and out[1].eq(-torch.inf).all()


@torch.no_grad()
def test_nothing_kept():
    """The two finest levels propose nothing at all."""
    nothing = Decision(torch.zeros(2, 16), torch.zeros(2, 16), (32, 32), 0.5, 8)
    x = Features(maps(), [nothing])
    gathered, masked = (run(build({}), x, execution) for execution in ('gather', 'masked'))
    close(gathered, masked)
    assert all(score.eq(-torch.inf).all() for score in gathered[0][:2])


@torch.no_grad()
@pytest.mark.parametrize('hw', [(32, 32), (27, 38)])
def test_decision_of_its_own(hw):
    head = build(dict(keep_ratio=0.25, predictor=dict(type='mmdynsparse.CellPredictor')))
    gathered = head(maps(hw))
    (decision,) = head.decider.decisions
    cells = decision.grid[0] * decision.grid[1]
    assert decision.mask.sum(1).tolist() == [cells // 4] * 2
    head.decider.execution = 'masked'
    close(gathered, head(maps(hw)))
    if hw == (32, 32):  # no cell reaches beyond the map
        assert gathered[0][0].isfinite().float().mean((1, 2, 3)).tolist() == [0.25, 0.25]


@torch.no_grad()
def test_mixed_precision():
    """Under autocast all levels have one dtype, and both executions agree."""
    head = build({})
    with torch.autocast('cpu', torch.bfloat16):
        gathered, masked = run(head, features()), run(head, features(), 'masked')
    assert {x.dtype for part in gathered + masked for x in part} == {torch.bfloat16}
    for one, other in zip(gathered, masked, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)


@torch.no_grad()
def test_a_low_score_is_not_a_dropped_one():
    """In training a proposal stays that is less certain than a dropped location's logit."""
    head = build({}).train()
    scores, deltas = head(features(ratio=1.0))
    scores = [torch.full_like(score, -14.0) for score in scores]
    for proposals in head.predict_by_feat(
        scores, deltas, batch_img_metas=[META, META], cfg=head.test_cfg, rescale=False
    ):
        assert len(proposals) > 0


@torch.no_grad()
@pytest.mark.parametrize('training', [False, True])
def test_proposals(training):
    """Kept locations propose boxes, dropped ones none."""
    head = build({}).train(training)
    scores, deltas = head(features())
    for level in (2, 3):
        scores[level] = torch.full_like(scores[level], -10 if training else -torch.inf)
    first, second = head.predict_by_feat(
        scores, deltas, batch_img_metas=[META, META], cfg=head.test_cfg, rescale=False
    )
    assert len(first) > 0
    centers = (first.bboxes[:, 0] + first.bboxes[:, 2]) / 2
    assert centers.median() < 64  # of 128, the left half
    assert len(second) == 0


@torch.no_grad()
@pytest.mark.parametrize('most', [1, 20, 100, 5000])
@pytest.mark.parametrize('threshold', [0.01, 0.3, 0.7])
def test_nms_of_fewer_boxes_has_the_same_proposals(most, threshold):
    """Also where the first boxes suppress one another, so that more are looked at."""
    head = build()
    head.test_cfg.update(max_per_img=most, nms=dict(type='nms', iou_threshold=threshold))
    dense = dense_of(head)
    dense.test_cfg.update(head.test_cfg)
    found, expected = (
        rpn.predict_by_feat(*rpn(maps()), batch_img_metas=[META, META], rescale=True)
        for rpn in (head, dense)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert 0 < len(ours) <= most
        torch.testing.assert_close(ours.scores, theirs.scores)
        torch.testing.assert_close(ours.bboxes, theirs.bboxes)


def test_nms_of_another_kind_is_that_of_mmdet():
    """Soft NMS changes the scores of all boxes."""
    head = build()
    head.test_cfg.update(max_per_img=20, nms=dict(type='soft_nms', iou_threshold=0.5))
    dense = dense_of(head)
    dense.test_cfg.update(head.test_cfg)
    with torch.no_grad():
        ours, theirs = (
            rpn.predict_by_feat(*rpn(maps()), batch_img_metas=[META, META])[0]
            for rpn in (head, dense)
        )
    torch.testing.assert_close(ours.scores, theirs.scores)


def test_an_object_that_is_missed_raises_the_mask():
    """The loss tells the mask to keep the location of an object."""
    head = build({}).train()
    x = features()
    mask = x.decisions[0].mask.clone().requires_grad_()
    x = Features(tuple(x), [x.decisions[0]._replace(mask=mask)])
    # Of the size of an anchor of the finest level, in the dropped right half.
    boxes = torch.tensor([[84.0, 52.0, 116.0, 84.0]])
    gt = InstanceData(bboxes=boxes, labels=torch.zeros(1, dtype=torch.long))
    losses = head.loss_by_feat(*head(x), [gt, gt], [META, META])
    sum(sum(value) for value in losses.values()).backward()
    at_object = mask.grad.view(2, 4, 4)[0, 1:3, 2:].sum()
    assert at_object < 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_losses_of_a_validation_are_those_of_training():
    """A dropped location has no infinite loss, whichever way it is computed."""
    gt = InstanceData(
        bboxes=torch.tensor([[84.0, 52.0, 116.0, 84.0]]), labels=torch.zeros(1).long()
    )
    losses = []
    for training, execution in ((True, 'gather'), (False, 'masked'), (False, 'gather')):
        head = build({}).train(training)
        torch.manual_seed(0)  # anchors are sampled
        out = head.loss_by_feat(*run(head, features(), execution), [gt, gt], [META, META])
        losses.append(torch.stack([torch.stack(value).sum() for value in out.values()]))
    assert losses[0].isfinite().all()
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])


@torch.no_grad()
@pytest.mark.parametrize('name', ['rpn_conv', 'rpn_cls', 'rpn_reg'])
def test_hooks_on_layers_are_not_skipped(name):
    head = build({})
    before = run(head, features())
    head.get_submodule(name).register_forward_hook(lambda module, args, out: 2 * out)
    gathered = run(head, features())
    close(gathered, run(head, features(), 'masked'))
    changed = [
        (a - b).abs()
        for x, y in zip(gathered, before, strict=True)
        for a, b in zip(x, y, strict=True)
    ]
    assert max(x[x.isfinite()].max() for x in changed) > 1e-3


def test_one_level():
    with pytest.raises(ValueError, match='at least 2 levels, got 1'):
        build(dict(keep_ratio=0.5))(maps()[:1])


BAD = {
    'softmax': (dict(loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False)), 'use_sigmoid'),
    'ratio': (dict(sparsity=dict(keep_ratio=0)), r'in \(0, 1\], got 0'),
    'predictor': (dict(sparsity=dict(keep_ratio=0.5, predictor=None)), 'must be a config'),
    'backbone': (dict(sparsity=dict(keep_ratio=0.5, predictor='backbone')), "got 'backbone'"),
}


@pytest.mark.parametrize(('kwargs', 'message'), BAD.values(), ids=BAD)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(**{'sparsity': {}, **kwargs})


@torch.no_grad()
def test_several_convolutions():
    head = build({}, num_convs=2)
    close(run(head, features()), run(head, features(), 'masked'))
    dense = build(kind='RPNHead', num_convs=2)
    dense.load_state_dict(head.state_dict())
    close(head(features(ratio=1.0)), dense(maps()))


@torch.no_grad()
def test_cells_by_magnitude():
    head = build(dict(keep_ratio=0.5, predictor=dict(type='mmdynsparse.MagnitudeScore')))
    expected = head(maps())
    close(run(head, maps(), 'masked'), expected)
    decision = head.decider.decisions[0]
    magnitude = maps()[1].abs().mean(1).square()
    means = F.avg_pool2d(magnitude, 4).flatten(1)
    assert torch.equal(decision.scores.argsort(1), means.argsort(1))
