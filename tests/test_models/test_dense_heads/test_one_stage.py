"""Sparse heads of one-stage detectors against mmdet's, alone and behind a SparseFPN."""

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.structures import InstanceData

from mmdynsparse.models.decider import deciders
from mmdynsparse.models.features import Features
from mmdynsparse.ops import Decision, keep_all

from .conftest import close, left_half, neck_maps, run

pytest.importorskip('mmdet')

STRIDES = [8, 16, 32, 64, 128]
ANCHOR = dict(type='AnchorGenerator', ratios=[1.0], octave_base_scale=8, scales_per_octave=1)
MAX_IOU = dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0)
GROUPS = dict(type='GN', num_groups=4)
HEADS = dict(
    RetinaHead=dict(
        anchor_generator=dict(ANCHOR, octave_base_scale=4, scales_per_octave=2, strides=STRIDES),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        loss_bbox=dict(type='L1Loss'),
        assigner=MAX_IOU,
    ),
    FCOSHead=dict(strides=STRIDES, norm_cfg=GROUPS, loss_bbox=dict(type='GIoULoss'), assigner=None),
    ATSSHead=dict(
        anchor_generator=dict(ANCHOR, strides=STRIDES),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        norm_cfg=GROUPS,
        loss_bbox=dict(type='GIoULoss'),
        assigner=dict(type='ATSSAssigner', topk=9),
    ),
    GFLHead=dict(
        anchor_generator=dict(ANCHOR, strides=STRIDES),
        norm_cfg=GROUPS,
        loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True, beta=2.0),
        loss_bbox=dict(type='GIoULoss'),
        reg_max=4,
        assigner=dict(type='ATSSAssigner', topk=9),
    ),
)
FOCAL = dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0)
PREDICTOR = dict(type='mmdynsparse.CellPredictor')
META = dict(img_shape=(256, 256), pad_shape=(256, 256), scale_factor=(1.0, 1.0))
every_head = pytest.mark.parametrize('kind', HEADS)


def maps(hw=(32, 32)):
    return neck_maps(len(STRIDES), hw)


def build(kind, sparsity=None, dense=False, **kwargs):
    torch.manual_seed(1)
    cfg = {**HEADS[kind], 'loss_cls': HEADS[kind].get('loss_cls', FOCAL), **kwargs}
    assigner = cfg.pop('assigner')
    cfg |= dict(num_classes=3, in_channels=16, feat_channels=16, stacked_convs=2)
    cfg['train_cfg'] = ConfigDict(assigner=assigner, allowed_border=-1, pos_weight=-1)
    nms = dict(type='nms', iou_threshold=0.6)
    cfg['test_cfg'] = ConfigDict(
        nms_pre=1000, score_thr=0.0, nms=nms, max_per_img=1000, min_bbox_size=0
    )
    if not dense:
        cfg['sparsity'] = sparsity
    if assigner is None:
        del cfg['train_cfg']
    with MMENGINE_MODELS.switch_scope_and_registry('mmdet') as registry:
        head = registry.build(dict(type=kind if dense else f'mmdynsparse.Sparse{kind}', **cfg))
    for name, tensor in head.state_dict().items():
        if not name.startswith('integral'):
            tensor.add_(0.1 * torch.randn(tensor.shape))
    return head.eval()


def dense_of(head, kind, **kwargs):
    dense = build(kind, dense=True, **kwargs)
    keys = dense.load_state_dict(head.state_dict(), strict=False)
    assert not keys.missing_keys
    assert all(key.startswith('decider.predictor.') for key in keys.unexpected_keys)
    return dense


def features(ratio=0.5):
    return Features(maps(), [left_half(ratio)])


@torch.no_grad()
@every_head
@pytest.mark.parametrize('training', [False, True])
def test_dense(kind, training):
    """Without sparsity, or anything to drop, the head is mmdet's."""
    for sparsity in (None, {}, dict(keep_ratio=1.0), dict(keep_ratio=1.0, predictor=PREDICTOR)):
        head = build(kind, sparsity).train(training)
        expected = dense_of(head, kind).train(training)(maps())
        decision = keep_all(2, (32, 32), torch.device('cpu'), 8)
        close(head(Features(maps(), [decision])), expected)


@torch.no_grad()
@pytest.mark.parametrize('norm_on_bbox', [False, True])
@pytest.mark.parametrize('centerness_on_reg', [False, True])
def test_options_of_fcos(norm_on_bbox, centerness_on_reg):
    options = dict(norm_on_bbox=norm_on_bbox, centerness_on_reg=centerness_on_reg)
    head = build('FCOSHead', dict(keep_ratio=1.0), **options)
    close(head(maps()), dense_of(head, 'FCOSHead', **options)(maps()))
    head.decider.set_keep_ratio(0.3)
    close(run(head, maps()), run(head, maps(), 'masked'))


@torch.no_grad()
@every_head
@pytest.mark.parametrize('hw', [(32, 32), (27, 38)])
@pytest.mark.parametrize('sparsity', [dict(), dict(predictor=PREDICTOR), dict(cell_size=4)])
def test_executions_agree(kind, hw, sparsity):
    head = build(kind, dict(keep_ratio=0.3, **sparsity))
    gathered = run(head, maps(hw))
    second, finest = head.decider.decisions
    for decision, ratio in ((second, 0.6), (finest, 0.3)):
        kept = int(decision.mask.shape[1] * ratio)
        assert decision.mask.sum(1).tolist() == [kept] * 2
    close(gathered, run(head, maps(hw), 'masked'))


@torch.no_grad()
@every_head
def test_decision_of_the_neck(kind):
    """It is followed on both levels; a dropped location detects nothing, coarser ones are dense."""
    head = build(kind, {})
    gathered = run(head, features())
    close(gathered, run(head, features(), 'masked'))
    dense = dense_of(head, kind)(maps())
    for level, (out, expected) in enumerate(zip(gathered[0], dense[0], strict=True)):
        if level > 1:
            torch.testing.assert_close(out, expected)
            continue
        half = out.shape[3] // 2
        assert out[0, ..., half:].eq(-torch.inf).all() and out[1].eq(-torch.inf).all()
        assert out[0, ..., :half].isfinite().all()
    results = head.predict_by_feat(
        *gathered, batch_img_metas=[META, META], cfg=head.test_cfg, rescale=False
    )
    assert all(len(result) > 0 and result.scores.gt(0).all() for result in results)


@torch.no_grad()
def test_kept_locations_away_from_dropped_cells_are_dense():
    """Two layers and a prediction read 3 positions around a location, one of them of the map."""
    head = build('RetinaHead', {})
    dense, sparse = dense_of(head, 'RetinaHead')(maps()), head(features())
    for level, width in ((0, 16), (1, 8)):
        for out, expected in zip(sparse, dense, strict=True):
            same = (slice(0, 1), slice(None), slice(None), slice(0, width - 2))
            torch.testing.assert_close(out[level][same], expected[level][same])
    border = sparse[0][0][0, ..., 14:16] - dense[0][0][0, ..., 14:16]
    assert border.abs().max() > 1e-3


@torch.no_grad()
def test_the_next_level_chooses_the_cells():
    """The best-scored cells of the third level on the second, and of these on the finest."""
    head = build('RetinaHead', dict(keep_ratio=[0.5, 0.25]))
    scores = head(maps())[0]
    second, finest = head.decider.decisions
    best = torch.nn.functional.max_pool2d(scores[2].amax(1), 4).flatten(1)
    assert torch.equal(second.scores.argsort(1), best.argsort(1))
    kept = second.mask.view(2, 2, 2).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
    assert (finest.mask <= kept).all()
    best = torch.nn.functional.max_pool2d(scores[1].amax(1), 4).flatten(1)
    assert torch.equal(finest.mask, torch.zeros(2, 16).scatter(1, best.topk(4).indices, 1.0))


@every_head
def test_nothing_kept(kind):
    """Neither level detects anything, and no group norm divides by zero."""
    nothing = Decision(torch.zeros(2, 16), torch.zeros(2, 16), (32, 32), 0.5, 8)
    x = Features(maps(), [nothing])
    head = build(kind, {})
    with torch.no_grad():
        gathered = run(head, x)
        close(gathered, run(head, x, 'masked'))
    assert all(score.eq(-torch.inf).all() for score in gathered[0][:2])
    losses = head.train().loss_by_feat(*head(x), [objects(1)] * 2, [META, META])
    total = sum(torch.as_tensor(sum(value)) for value in map(as_list, losses.values()))
    total.backward()
    assert total.isfinite()
    assert all(p.grad.isfinite().all() for p in head.parameters() if p.grad is not None)


def as_list(value):
    return value if isinstance(value, list) else [value]


def objects(count):
    """An object of the finest level's size in the right half."""
    boxes = torch.tensor([[172.0, 100.0, 204.0, 132.0]])[:count]
    return InstanceData(bboxes=boxes, labels=torch.zeros(count, dtype=torch.long))


def total_loss(head, x, *counts):
    out = head.loss_by_feat(*head(x), [objects(n) for n in counts], [META, META])
    return torch.stack([sum(as_list(value)) for value in out.values()]).sum()


@every_head
def test_losses_are_finite_without_objects(kind):
    head = build(kind, dict(keep_ratio=0.25, predictor=PREDICTOR)).train()
    loss = total_loss(head, maps(), 0, 0)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())


@every_head
def test_an_object_that_is_missed_raises_the_mask(kind):
    head = build(kind, {}).train()
    x = features()
    mask = x.decisions[0].mask.clone().requires_grad_()
    x = Features(tuple(x), [x.decisions[0]._replace(mask=mask)])
    total_loss(head, x, 1, 1).backward()
    assert mask.grad.view(2, 4, 4)[0, 1:3, 2:].sum() < 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@every_head
def test_losses_of_a_validation_are_those_of_training(kind):
    losses = []
    for training, execution in ((True, 'gather'), (False, 'masked'), (False, 'gather')):
        head = build(kind, {}).train(training)
        if kind == 'FCOSHead':  # in eval mode, distances are in px
            head.norm_on_bbox = False
        head.decider.execution = execution
        losses.append(total_loss(head, features(), 1, 1))
    assert losses[0].isfinite()
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])


@every_head
def test_coarse_scores_choose_alike_in_training(kind):
    """Nothing is sampled, and what is dropped on the second level stays dropped on the finest."""
    head = build(kind, dict(keep_ratio=0.3))
    with torch.no_grad():
        expected = head(maps())
        chosen = [decision.mask for decision in head.decider.decisions]
        out = head.train()(maps())
    for mask, decision in zip(chosen, head.decider.decisions, strict=True):
        assert torch.equal(mask, decision.mask)
    finite = expected[0][0].isfinite()
    torch.testing.assert_close(out[0][0][finite], expected[0][0][finite], atol=1e-5, rtol=1e-5)
    assert out[0][0][~finite].eq(-10).all()


@torch.no_grad()
@every_head
def test_mixed_precision(kind):
    head = build(kind, dict(keep_ratio=0.3))
    with torch.autocast('cpu', torch.bfloat16):
        gathered, masked = run(head, maps()), run(head, maps(), 'masked')
    for one, other in zip(gathered, masked, strict=True):
        assert {x.dtype for x in one} == {x.dtype for x in other}
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, atol=0.1, rtol=0.1)


@torch.no_grad()
def test_hooks_on_layers_are_not_skipped():
    head = build('RetinaHead', dict(keep_ratio=0.3))
    before = run(head, maps())
    for name in ('cls_convs.1', 'retina_reg'):
        head.get_submodule(name).register_forward_hook(lambda module, args, out: 2 * out)
    gathered = run(head, maps())
    close(gathered, run(head, maps(), 'masked'))
    assert not torch.allclose(gathered[0][2], before[0][2])
    assert not torch.allclose(gathered[1][0], before[1][0])


@torch.no_grad()
def test_keep_ratios_of_a_built_model():
    head = build('ATSSHead', dict(keep_ratio=0.3))
    (decider,) = deciders(head).values()
    assert decider.keep_ratios == [0.6, 0.3]
    for ratio, expected in ((0.7, [1.0, 0.7]), ([0.5, 0.5], [0.5, 0.5])):
        decider.set_keep_ratio(ratio)
        assert decider.keep_ratios == expected
        close(run(head, maps()), run(head, maps(), 'masked'))
    with pytest.raises(ValueError, match='must not rise'):
        decider.set_keep_ratio([0.2, 0.5])


def test_maps_that_do_not_halve():
    x = maps()
    for level, name in ((0, 'second'), (1, 'third')):
        wrong = [torch.randn(2, 16, 2 * 24 // 2**i, 24 // 2**i) for i in range(5)]
        wrong[level] = x[level]
        message = f'{name} map of a sparse RetinaNet head must have half'
        with pytest.raises(ValueError, match=message):
            build('RetinaHead', dict(keep_ratio=0.3))(wrong)
    with pytest.raises(ValueError, match='at least 3 levels, got 2'):
        build('RetinaHead', dict(keep_ratio=0.3))(x[:2])
    with pytest.raises(ValueError, match='carry a decision'):
        build('RetinaHead', {})(x)


BATCH = dict(norm_cfg=dict(type='BN'))
BAD = {
    'norm': ('RetinaHead', BATCH, 'a group norm or None in a sparse head, got .*BatchNorm2d'),
    'norm of FCOS': ('FCOSHead', BATCH, 'a group norm or None'),
    'deformable': ('FCOSHead', dict(dcn_on_last_conv=True), 'plain 3 x 3 convolution'),
    'kernel': ('ATSSHead', dict(pred_kernel_size=5), '3 x 3 or 1 x 1, got'),
    'softmax': (
        'RetinaHead',
        dict(loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False)),
        'use_sigmoid in a sparse RetinaNet head, got CrossEntropyLoss',
    ),
    'ratio': ('GFLHead', dict(sparsity=dict(keep_ratio=0)), r'in \(0, 1\], got 0'),
    'rising': ('GFLHead', dict(sparsity=dict(keep_ratio=[0.2, 0.4])), 'must not rise'),
    'ratios': ('GFLHead', dict(sparsity=dict(keep_ratio=[0.5, 0.4, 0.3])), 'a list of 2'),
    'cell': ('GFLHead', dict(sparsity=dict(keep_ratio=0.5, cell_size=3)), 'even number'),
    'backbone': (
        'ATSSHead',
        dict(sparsity=dict(keep_ratio=0.5, predictor='backbone')),
        "must be a config in a sparse ATSS head, got 'backbone'",
    ),
}


@pytest.mark.parametrize(('kind', 'kwargs', 'message'), BAD.values(), ids=BAD)
def test_bad_arguments(kind, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(kind, **{'sparsity': {}, **kwargs})
