"""SparseFCNMaskHead against mmdet's FCNMaskHead."""

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import ConfigDict
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.structures import InstanceData

pytest.importorskip('mmdet')

SMALL = dict(in_channels=8, conv_out_channels=8, num_classes=3, num_convs=2)
SCORES = [torch.tensor([0.2, 0.9, 0.4]), torch.tensor([]), torch.tensor([0.6, 0.7])]
LABELS = torch.tensor([2, 0, 1, 1, 2])


def build(sparsity=None, kind='mmdynsparse.SparseFCNMaskHead', **kwargs):
    torch.manual_seed(0)
    cfg = {**SMALL, **kwargs}
    if kind != 'FCNMaskHead':
        cfg['sparsity'] = sparsity
    with MMENGINE_MODELS.switch_scope_and_registry('mmdet') as registry:
        head = registry.build(dict(type=kind, **cfg))
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return head.eval()


def dense_of(head, **kwargs):
    dense = build(kind='FCNMaskHead', **kwargs)
    dense.load_state_dict(head.state_dict())  # the very same names
    return dense


def features(n=5, size=14):
    return torch.randn(n, 8, size, size, generator=torch.Generator().manual_seed(1))


KINDS = [
    {},
    dict(class_agnostic=True),
    dict(norm_cfg=dict(type='BN')),
    dict(upsample_cfg=dict(type='bilinear', scale_factor=2)),
    dict(upsample_cfg=dict(type=None)),
]


@torch.no_grad()
@pytest.mark.parametrize('kwargs', KINDS)
@pytest.mark.parametrize('sparsity', [None, dict(keep_ratio=1.0)])
def test_dense(kwargs, sparsity):
    """Without sparsity, or with everything kept, the head is mmdet's."""
    head, x = build(sparsity, **kwargs), features()
    expected = dense_of(head, **kwargs)(x)
    assert head._ends_in_blocks == ('upsample_cfg' not in kwargs)
    torch.testing.assert_close(head(x, SCORES), expected)
    labels = torch.zeros_like(LABELS) if kwargs.get('class_agnostic') else LABELS
    own = head(x, SCORES, LABELS)
    torch.testing.assert_close(own, expected[torch.arange(5), labels][:, None])


@torch.no_grad()
@pytest.mark.parametrize('kwargs', KINDS)
@pytest.mark.parametrize('keep_ratio', [0.3, 0.5, 0.7])
def test_executions_agree(kwargs, keep_ratio):
    head, x = build(dict(keep_ratio=keep_ratio), **kwargs), features()
    gathered = head(x, SCORES)
    head.decider.execution = 'masked'
    torch.testing.assert_close(head(x, SCORES), gathered)
    own = head(x, SCORES, LABELS)
    head.decider.execution = 'gather'
    torch.testing.assert_close(head(x, SCORES, LABELS), own)


@torch.no_grad()
def test_two_paths():
    """Kept regions are dense; the others are computed from features of half the size."""
    head, x = build(dict(keep_ratio=0.5)), features()
    dense, out = dense_of(head), head(x, SCORES)
    (decision,) = head.decider.decisions
    assert decision.mask.tolist() == [[0, 1, 0, 0, 1]]
    torch.testing.assert_close(out[[1, 4]], dense(x[[1, 4]]))
    light = F.avg_pool2d(x, 2)
    for conv in dense.convs:
        light = conv(light)
    light = F.interpolate(light, scale_factor=2, mode='bilinear')
    expected = dense.conv_logits(dense.upsample(light).relu())
    torch.testing.assert_close(out[[0, 2, 3]], expected[[0, 2, 3]])
    assert not torch.allclose(out[0], dense(x)[0], atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize('selector', ['topk', 'mass', 'random'])
def test_no_regions(selector):
    head = build(dict(keep_ratio=0.5, selector=selector))
    assert head(features(0), [torch.tensor([])]).shape == (0, 3, 28, 28)
    none = torch.zeros(0, dtype=torch.long)
    assert head(features(0), [torch.tensor([])], none).shape == (0, 1, 28, 28)


def test_training_runs_both_paths():
    head, x = build(dict(keep_ratio=0.5)).train(), features(8).requires_grad_()
    torch.manual_seed(0)
    out = head(x)
    mask = head.decider.decisions[0].mask[0].bool()
    assert mask.sum() == 4
    head.eval().decider.execution = 'masked'
    scores = [mask.float()]
    torch.testing.assert_close(head(x, scores), out)
    out.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in head.parameters())
    assert x.grad.flatten(1).abs().sum(1).gt(0).all()


def test_training_without_regions_has_gradients():
    head = build(dict(keep_ratio=0.5)).train()
    head(features(0).requires_grad_()).sum().backward()
    assert all(p.grad is not None and p.grad.eq(0).all() for p in head.parameters())


@torch.no_grad()
def test_no_scores(caplog):
    """A RoI head that hands over none gets the dense result, and the user a message."""
    head, x = build(dict(keep_ratio=0.5)), features()
    torch.testing.assert_close(head(x), dense_of(head)(x))
    assert head._warned


@torch.no_grad()
def test_bf16():
    head, x = build(dict(keep_ratio=0.5)), features()
    expected = head(x, SCORES, LABELS)
    with torch.autocast('cpu', torch.bfloat16):
        out = head(x, SCORES, LABELS)
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1 * expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize('class_agnostic', [False, True])
def test_pasted_masks_are_those_of_the_own_class(class_agnostic):
    head = build(class_agnostic=class_agnostic)
    dense, x = dense_of(head, class_agnostic=class_agnostic), features()
    boxes = torch.tensor(
        [[2.0, 3, 20, 24], [0, 0, 30, 30], [5, 5, 9, 28], [1, 1, 8, 8], [3, 0, 30, 4]]
    )
    cfg = ConfigDict(mask_thr_binary=0.5)
    meta = dict(scale_factor=(1.0, 1.0), ori_shape=(32, 32))

    def pasted(head, logits):
        found = InstanceData(bboxes=boxes.clone(), labels=LABELS)
        return head.predict_by_feat([logits], [found], [meta], cfg)[0].masks

    assert pasted(head, head(x, SCORES, LABELS)).equal(pasted(dense, dense(x)))
    assert pasted(head, head(x)).equal(pasted(dense, dense(x)))


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(sparsity=dict(keep_ratio=1.5)), r'keep_ratio must be a number in \(0, 1\]'),
        (dict(sparsity=dict(keep_ratio=0.5), num_convs=0), 'num_convs must be at least 1'),
        (dict(sparsity=dict(keep_ratio=0.5, predictor=None)), 'takes the keys'),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(**kwargs)


@torch.no_grad()
@pytest.mark.parametrize('size', [1, 7])
def test_odd_features(size):
    """Half a size is rounded up."""
    head, x = build(dict(keep_ratio=0.5)), features(size=size)
    gathered = head(x, SCORES)
    assert gathered.shape == (5, 3, 2 * size, 2 * size)
    head.decider.execution = 'masked'
    torch.testing.assert_close(head(x, SCORES), gathered)
