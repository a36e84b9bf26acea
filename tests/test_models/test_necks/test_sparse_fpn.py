"""SparseFPN against mmdet's FPN, masked against gathered execution."""

import pytest
import torch
from mmengine.registry import MODELS as MMENGINE_MODELS

from mmdynsparse.models.decider import Decider
from mmdynsparse.ops import Decision

pytest.importorskip('mmdet')

CHANNELS = (8, 12, 16, 20)
ARGUMENTS = dict(in_channels=list(CHANNELS), out_channels=16, num_outs=5)
EXTRA = {
    'mask rcnn': {},
    'retina': dict(start_level=1, add_extra_convs='on_input'),
    'relu': dict(num_outs=6, add_extra_convs='on_output', relu_before_extra_convs=True),
    'lateral': dict(add_extra_convs='on_lateral'),
    'norm': dict(norm_cfg=dict(type='BN'), act_cfg=dict(type='ReLU')),
}


def maps(hw=(32, 32), batch=2, seed=0):
    torch.manual_seed(seed)
    sizes = [hw]
    for _ in CHANNELS[1:]:
        sizes.append(tuple((side + 1) // 2 for side in sizes[-1]))
    return tuple(torch.randn(batch, c, *size) for c, size in zip(CHANNELS, sizes, strict=True))


def build(keep_ratio=0.4, kind='mmdynsparse.SparseFPN', **kwargs):
    torch.manual_seed(1)
    cfg = {**ARGUMENTS, **kwargs}
    if kind != 'FPN':
        cfg['sparsity'] = kwargs.get('sparsity', dict(keep_ratio=keep_ratio))
    with MMENGINE_MODELS.switch_scope_and_registry('mmdet') as registry:
        neck = registry.build(dict(type=kind, **cfg))
    for tensor in neck.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.1 * torch.rand_like(tensor))
    return neck.eval()


def dense_of(neck, **kwargs):
    dense = build(kind='FPN', **kwargs)
    keys = dense.load_state_dict(neck.state_dict(), strict=False)
    assert not keys.missing_keys
    assert all(key.startswith('decider.predictor.') for key in keys.unexpected_keys)
    return dense


def run(neck, inputs, execution='gather'):
    neck.decider.execution = execution
    with torch.no_grad():
        return neck(inputs)


def force(monkeypatch, masks):
    def predict(self, cells_BNC, hw, cell_size):
        return Decision(masks, torch.zeros_like(masks), hw, 0.5, cell_size)

    monkeypatch.setattr(Decider, 'predict', predict)


def close(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('kwargs', EXTRA.values(), ids=EXTRA)
def test_everything_kept_is_the_dense_neck(kwargs, monkeypatch):
    """With keep ratio 1, and cell by cell; for all ways to add levels."""
    neck = build(keep_ratio=1.0, **kwargs)
    expected = dense_of(neck, **kwargs)(maps((27, 38)))
    close(run(neck, maps((27, 38))), expected)
    neck = build(**kwargs)
    force(monkeypatch, torch.ones(2, 6 if neck.start_level else 20))
    for execution in ('gather', 'masked'):
        close(run(neck, maps((27, 38)), execution), expected)


@pytest.mark.parametrize('kwargs', EXTRA.values(), ids=EXTRA)
@pytest.mark.parametrize('hw', [(32, 32), (27, 38)])
def test_gathered_is_masked(kwargs, hw):
    """Both executions give the same maps, contiguous as RoIAlign needs them."""
    neck = build(**kwargs)
    masked = run(neck, maps(hw), 'masked')
    gathered = run(neck, maps(hw))
    assert 0 < gathered.decisions[0].mask.mean() < 1
    assert gathered.decisions[0].mask.equal(masked.decisions[0].mask)
    close(gathered, masked)
    assert all(x.is_contiguous() for x in (*gathered, *masked))
    neck.decider.set_keep_ratio(1.0)
    last = [x.contiguous(memory_format=torch.channels_last) for x in maps(hw)]
    assert all(x.is_contiguous() for x in run(neck, last))


@pytest.mark.parametrize('case', ['nothing', 'uneven'])
def test_gathered_is_masked_for_any_decision(case, monkeypatch):
    masks = torch.zeros(2, 20)
    if case == 'uneven':
        masks[1] = 1
        masks[0, 19] = 1
    force(monkeypatch, masks)
    neck = build()
    masked = run(neck, maps((27, 38)), 'masked')
    close(run(neck, maps((27, 38))), masked)
    if case == 'nothing':
        enlarged = torch.nn.functional.interpolate(masked[2], (14, 19))
        torch.testing.assert_close(masked[1], enlarged)


def test_dropped_cells_only_differ_from_dense():
    """Away from dropped cells a level is the dense one's."""
    neck = build(keep_ratio=0.5)
    outs, dense = run(neck, maps()), dense_of(neck)(maps())
    kept = outs.decisions[0].mask.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    torch.testing.assert_close(outs[0] * kept, dense[0] * kept, atol=1e-5, rtol=1e-5)
    assert not outs[0].allclose(dense[0], atol=1e-2)
    close(outs[2:], dense[2:])


def test_gradients():
    """In training every parameter, the predictor's too, learns from the maps."""
    neck = build().train()
    sum(x.square().mean() for x in neck(maps())).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in neck.parameters())


BAD = {
    'levels': (dict(end_level=1, num_outs=2), 'must have at least 3 levels, got 2'),
    'upsample': (dict(upsample_cfg=dict(mode='bilinear')), r"must be dict\(mode='nearest'\)"),
    'norm': (
        dict(norm_cfg=dict(type='GN', num_groups=4)),
        'an affine batch norm with running statistics or None',
    ),
    'ratio': (dict(sparsity=dict(keep_ratio=1.5)), r'in \(0, 1\], got 1.5'),
    'predictor': (dict(sparsity=dict(keep_ratio=0.5, predictor=None)), 'must be a config'),
}


@pytest.mark.parametrize(('kwargs', 'message'), BAD.values(), ids=BAD)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(**kwargs)


def test_bad_sizes():
    first, _, *others = maps()
    with pytest.raises(ValueError, match='half the height and width of the first'):
        build()((first, torch.randn(2, 12, 32, 32), *others))
    with pytest.raises(ValueError, match='one map for each of in_channels'):
        build()((*maps(), first))


def test_dense_without_sparsity():
    neck = build(sparsity=None)
    assert neck.decider is None
    close(neck(maps()), dense_of(neck)(maps()))


@pytest.mark.parametrize('execution', ['gather', 'masked'])
def test_mixed_precision(execution, monkeypatch):
    """Under autocast both executions are near the result in single precision."""
    neck = build()
    force(monkeypatch, torch.eye(4).flatten().expand(2, 16))
    expected = run(neck, maps(), execution)
    with torch.autocast('cpu', torch.bfloat16):
        actual = run(neck, maps(), execution)
    for one, other in zip(actual, expected, strict=True):
        assert (one.float() - other).norm() < 0.05 * other.norm()


def test_compiles_and_exports():
    """One graph in eval mode, with the results of eager execution."""
    neck = build()
    expected = run(neck, maps())
    torch._dynamo.reset()
    compiled = torch.compile(neck, fullgraph=True, backend='eager')
    close(run(compiled, maps()), expected)
    with torch.no_grad():
        exported = torch.export.export(neck, (maps(seed=1),))
    close(exported.module()(maps()), expected)


@pytest.mark.parametrize('selector', ['topk', dict(type='mass', least=0.2)])
def test_cells_by_magnitude(selector):
    """A dense checkpoint is sparse as it is; training selects the same cells."""
    predictor = dict(type='mmdynsparse.MagnitudeScore')
    neck = build(sparsity=dict(keep_ratio=0.4, predictor=predictor, selector=selector))
    assert not any('predictor' in key for key in neck.state_dict())
    gathered, kept = run(neck, maps()), neck.decider.decisions[0]
    close(run(neck, maps(), 'masked'), gathered)
    lateral = neck._laterals(maps())[0].abs().mean(1).square()
    expected = torch.nn.functional.avg_pool2d(lateral, 4).flatten(1)
    assert torch.equal(kept.scores.argsort(1), expected.argsort(1))
    trained = neck.train()(maps())
    assert torch.equal(trained.decisions[0].mask, kept.mask)
    assert not trained.decisions[0].mask.requires_grad
    close(trained, gathered)
