"""SparseUPerHead against mmseg's UPerHead, masked against gathered execution, and its levers."""

from copy import deepcopy

import pytest
import torch
from mmengine.registry import MODELS as MMENGINE_MODELS
from torch.utils.flop_counter import FlopCounterMode

from mmdynsparse.models.decider import Decider
from mmdynsparse.ops import Decision
from mmdynsparse.registry import MODELS

pytest.importorskip('mmseg')
pytestmark = pytest.mark.filterwarnings('ignore:When align_corners=True')

CHANNELS = (8, 12, 16, 24)
ARGUMENTS = dict(
    in_channels=list(CHANNELS),
    in_index=[0, 1, 2, 3],
    channels=16,
    num_classes=5,
    pool_scales=(1, 2),
    norm_cfg=dict(type='BN'),
)
PREDICTOR = dict(type='mmdynsparse.CellPredictor', reduction=2)


def maps(hw=(32, 32), batch=2, seed=0):
    """Maps of a backbone; each level halves the size and rounds up."""
    torch.manual_seed(seed)
    sizes = [hw]
    for _ in CHANNELS[1:]:
        sizes.append(tuple((side + 1) // 2 for side in sizes[-1]))
    return tuple(torch.randn(batch, c, *size) for c, size in zip(CHANNELS, sizes, strict=True))


def randomized(head):
    """Give a head weights and statistics that hide nothing."""
    torch.manual_seed(1)
    for name, tensor in head.state_dict().items():
        if tensor.is_floating_point():
            spread = 0.3 if tensor.dim() == 1 else tensor[0].numel() ** -0.5
            tensor.normal_(0, spread)
            if 'running_var' in name:
                tensor.abs_().add_(0.5)
    return head.eval()


def build(sparsity=None, **kwargs):
    return randomized(
        MODELS.build(
            dict(type='mmdynsparse.SparseUPerHead', sparsity=sparsity, **{**ARGUMENTS, **kwargs})
        )
    )


def dense_of(head, **kwargs):
    with MMENGINE_MODELS.switch_scope_and_registry('mmseg') as registry:
        dense = registry.build(dict(type='UPerHead', **{**ARGUMENTS, **kwargs})).eval()
    missing = dense.load_state_dict(head.state_dict(), strict=False)
    assert not missing.missing_keys
    assert all(key.startswith('decider.') for key in missing.unexpected_keys)
    return dense


def run(head, inputs, execution='gather'):
    if head.decider is not None:
        head.decider.execution = execution
    with torch.no_grad():
        return head(inputs)


def force(monkeypatch, masks):
    """Make heads decide for the given masks (B, N)."""

    def decide(self, scores, hw, cell_size):
        return Decision(masks, torch.zeros_like(masks), hw, 0.5, cell_size)

    monkeypatch.setattr(Decider, 'decide', decide)


@pytest.mark.parametrize('hw', [(32, 32), (27, 38)])
@pytest.mark.parametrize(
    'sparsity',
    [
        None,
        dict(resolution=False),
        dict(resolution=False, keep_ratio=1.0),
        dict(resolution=False, keep_ratio=1.0, predictor=PREDICTOR),
    ],
    ids=['none', 'levers off', 'everything kept', 'predictor'],
)
def test_is_the_dense_head(sparsity, hw):
    """Without levers, and with everything kept, the head is mmseg's."""
    for kwargs in ({}, dict(align_corners=True), dict(norm_cfg=None)):
        head = build(sparsity, **kwargs)
        expected = dense_of(head, **kwargs)(maps(hw))
        torch.testing.assert_close(run(head, maps(hw)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('hw', [(32, 32), (27, 38)])
def test_resolution_alone_decides_about_the_levels(hw):
    """Whatever the keep ratio: from 0.99 to 1.0 neither function nor speed change."""
    head = build(dict(keep_ratio=1.0))
    by_level = build(dict())
    by_level.load_state_dict(head.state_dict())
    torch.testing.assert_close(run(head, maps(hw)), run(by_level, maps(hw)))
    dense = dense_of(head)(maps(hw))
    assert (run(head, maps(hw)) - dense).abs().max() > 1e-3
    with FlopCounterMode(display=False) as counter:
        run(head, maps(hw))
    at_one = counter.get_total_flops()
    head.decider.set_keep_ratio(0.99)
    with FlopCounterMode(display=False) as counter:
        run(head, maps(hw))
    assert counter.get_total_flops() < 1.5 * at_one


def test_everything_kept_in_cells_is_dense(monkeypatch):
    """Cells computed one by one give the dense result when all are kept."""
    head = build(dict(resolution=False, keep_ratio=0.5))
    force(monkeypatch, torch.ones(2, 20))
    for execution in ('gather', 'masked'):
        actual = run(head, maps((27, 38)), execution)
        expected = dense_of(head)(maps((27, 38)))
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_training_at_ratio_one_is_dense():
    """While a schedule keeps everything, the logits are mmseg's, and the predictor learns."""
    sparsity = dict(keep_ratio=1.0, predictor=PREDICTOR, resolution=False)
    head = build(sparsity, dropout_ratio=0).train()
    dense = dense_of(head, dropout_ratio=0).train()
    actual, expected = head(maps()), dense(maps())
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    actual.square().mean().backward()
    assert any(p.grad.abs().sum() > 0 for p in head.decider.parameters())


def test_resolution_is_exact_on_flat_maps():
    """Where the enlarged levels are constant, splitting the convolution changes the border only."""
    head = build({})
    inputs = [x.mean((2, 3), keepdim=True).expand_as(x) for x in maps((64, 64))]
    expected = dense_of(head)(inputs)
    actual = run(head, inputs)
    inner = (slice(None), slice(None), slice(24, 40), slice(24, 40))
    torch.testing.assert_close(actual[inner], expected[inner], atol=1e-5, rtol=1e-5)
    assert (actual - expected).abs().max() < 0.5 * expected.abs().max()


@pytest.mark.parametrize('predictor', [None, PREDICTOR], ids=['entropy', 'predictor'])
@pytest.mark.parametrize('resolution', [True, False])
@pytest.mark.parametrize('hw', [(32, 32), (27, 38)])
@pytest.mark.parametrize('selector', ['topk', 'mass'])
def test_gathered_is_masked(predictor, resolution, hw, selector):
    """Both executions give the same logits for the decision that each makes."""
    head = build(
        dict(keep_ratio=0.4, resolution=resolution, predictor=predictor, selector=selector)
    )
    masked = run(head, maps(hw), 'masked')
    (decision,) = head.decider.decisions
    gathered = run(head, maps(hw))
    assert head.decider.decisions[0].mask.equal(decision.mask)
    assert 0 < decision.mask.mean() < 1
    torch.testing.assert_close(gathered, masked, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('case', ['nothing', 'everything', 'uneven', 'corner'])
def test_gathered_is_masked_for_any_decision(case, monkeypatch):
    """Nothing kept, everything, a different count in each image, a corner only."""
    masks = torch.zeros(2, 20)
    masks[1 if case == 'uneven' else slice(None)] = float(case in ('everything', 'uneven'))
    masks[0, 19] = float(case in ('corner', 'everything', 'uneven'))
    head = build(dict(keep_ratio=0.5))
    force(monkeypatch, masks)
    masked = run(head, maps((27, 38)), 'masked')
    gathered = run(head, maps((27, 38)))
    torch.testing.assert_close(gathered, masked, atol=1e-5, rtol=1e-5)


def test_entropy_keeps_the_uncertain_cells():
    """Cells whose coarse prediction is certain are dropped."""
    head = build(dict(keep_ratio=0.5))
    logits = torch.zeros(1, 5, 16, 16)
    logits[:, 0, :, 8:] = 20  # the right half is certain
    coarse = type('Coarse', (), dict(logits=logits))
    decision = head._decide(coarse, (32, 32))
    assert decision.mask.view(4, 4).tolist() == [[1, 1, 0, 0]] * 4


def test_ratio_and_scores():
    """The share that is kept is the target's; scores are logarithms of a share."""
    head = build(dict(keep_ratio=0.25))
    run(head, maps())
    (decision,) = head.decider.decisions
    assert decision.mask.mean(1).tolist() == [0.25, 0.25]
    assert (decision.scores <= 0).all()
    head.decider.set_keep_ratio(0.5)
    run(head, maps())
    assert head.decider.decisions[0].mask.mean() == 0.5


def test_predictor_learns_from_the_task():
    """In training every parameter gets a gradient."""
    head = build(dict(keep_ratio=0.5, predictor=PREDICTOR)).train()
    head(maps()).square().mean().backward()
    grads = {name: p.grad for name, p in head.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    assert any(grads[name].abs().sum() > 0 for name in grads if name.startswith('decider.'))


@pytest.mark.parametrize('resolution', [True, False])
def test_statistics_are_those_of_the_fine_path(resolution):
    """Training updates the running statistics as if every cell were kept."""
    head = build(dict(keep_ratio=0.5, predictor=PREDICTOR, resolution=resolution)).train()
    dense = build(dict() if resolution else None).train()
    dense.load_state_dict(head.state_dict(), strict=False)
    for model in (head, dense):
        model(maps())
    before = build(dict(keep_ratio=0.5, predictor=PREDICTOR)).state_dict()
    for name, buffer in dense.named_buffers():
        torch.testing.assert_close(head.get_buffer(name), buffer, msg=name)
        assert not torch.equal(buffer, before[name]), name


def test_gradients_of_the_light_path():
    """They are those of the statistics it was computed with, which the fine path then updates."""
    grads = []
    for momentum in (0.1, 0.0):  # with 0.0 nothing is updated
        head = build(dict(keep_ratio=0.5)).train()
        for norm in (m for m in head.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.momentum = momentum
        head(maps()).square().mean().backward()
        grads.append({name: p.grad for name, p in head.named_parameters()})
    torch.testing.assert_close(grads[0], grads[1])


def test_trains_with_the_entropy():
    """Without a predictor the head still trains on what it keeps."""
    head = build(dict(keep_ratio=0.5)).train()
    head(maps()).square().mean().backward()
    assert all(p.grad is not None for p in head.parameters())
    assert head.decider.decisions[0].mask.mean() == 0.5


def test_checkpoints():
    """A dense checkpoint lacks the predictor only; a copy forgets the decision."""
    head = build(dict(keep_ratio=0.5, predictor=PREDICTOR))
    dense = dense_of(head)
    keys = head.load_state_dict(dense.state_dict(), strict=False)
    assert not keys.unexpected_keys
    assert {key.split('.')[0] for key in keys.missing_keys} == {'decider'}
    run(head, maps())
    assert deepcopy(head).decider.decisions == ()


@pytest.mark.parametrize('resolution', [True, False])
def test_compiles_and_exports(resolution):
    """One graph in eval mode, with the results of eager execution and its decision."""
    head = build(dict(keep_ratio=0.5, resolution=resolution))
    expected = run(head, maps())
    mask = head.decider.decisions[0].mask
    torch._dynamo.reset()
    compiled = torch.compile(head, fullgraph=True, backend='eager')
    torch.testing.assert_close(run(compiled, maps()), expected)
    assert head.decider.decisions[0].mask.equal(mask)
    with torch.no_grad():
        exported = torch.export.export(head, (maps(seed=1),))
    torch.testing.assert_close(exported.module()(maps()), expected)
    torch.testing.assert_close(run(head, maps()), expected)


def double(module, args, out):
    return 2 * out


@pytest.mark.parametrize(
    'name', ['fpn_bottleneck', 'fpn_bottleneck.conv', 'fpn_convs.0.conv', 'lateral_convs.0']
)
def test_hooks_on_layers_are_not_skipped(name):
    """What somebody puts around a layer, such as an adapter, acts in both executions."""
    head = build(dict(keep_ratio=0.4))
    before = run(head, maps())
    head.get_submodule(name).register_forward_hook(double)
    gathered = run(head, maps())
    torch.testing.assert_close(gathered, run(head, maps(), 'masked'), atol=1e-4, rtol=1e-4)
    assert (gathered - before).abs().max() > 1e-2
    head.decider.set_keep_ratio(1.0)
    head.resolution = False
    dense = dense_of(head)
    dense.get_submodule(name).register_forward_hook(double)
    torch.testing.assert_close(run(head, maps()), dense(maps()), atol=1e-4, rtol=1e-4)


BAD = {
    'resolution': (dict(resolution=1), 'resolution must be True or False, got 1'),
    'unknown': (dict(keep_rate=0.5), r'takes the keys .* got \[.keep_rate'),
    'no ratio': (dict(cell_size=8), 'needs keep_ratio'),
    'ratio': (dict(keep_ratio=0.0), r'keep_ratio must be a number in \(0, 1\], got 0.0'),
    'cell': (dict(keep_ratio=0.5, cell_size=3), 'cell_size must be an even number from 2 on, got'),
    'selector': (dict(keep_ratio=0.5, selector='best'), 'selector must be one of'),
}


@pytest.mark.parametrize(('sparsity', 'message'), BAD.values(), ids=BAD)
def test_bad_sparsity(sparsity, message):
    with pytest.raises(ValueError, match=message):
        build(sparsity)


def test_bad_norm_and_sizes():
    with pytest.raises(ValueError, match='must be a plain convolution and an affine batch norm'):
        build(dict(keep_ratio=0.5), norm_cfg=dict(type='GN', num_groups=4))
    with pytest.raises(ValueError, match='with running statistics'):
        build(dict(keep_ratio=0.5), norm_cfg=dict(type='BN', track_running_stats=False))
    with pytest.raises(ValueError, match='at least 2 levels in a sparse UPerHead, got'):
        build(dict(keep_ratio=0.5), in_channels=[12], in_index=[0])
    head = build(dict(keep_ratio=0.5))
    first, _, *others = maps()
    with pytest.raises(ValueError, match='half the height and width'):
        head((first, torch.randn(2, 12, 32, 32), *others))


@pytest.mark.parametrize('execution', ['gather', 'masked'])
def test_mixed_precision(execution):
    """Under autocast both executions run, near the result in single precision."""
    head = build(dict(keep_ratio=0.4, predictor=PREDICTOR))
    expected = run(head, maps(), execution)
    kept = head.decider.decisions[0].mask
    with torch.autocast('cpu', torch.bfloat16):
        actual = run(head, maps(), execution)
    same = head.decider.decisions[0].mask.equal(kept)
    error = (actual.float() - expected).norm() / expected.norm()
    assert error < (0.05 if same else 0.5)
