"""What holds for every registered sparse backbone."""

import copy
import pickle
import re

import pytest
import torch
from mmengine.registry import MODELS

from mmdynsparse.layers import LowRankFastPath
from mmdynsparse.models.backbones import SparseBackbone
from mmdynsparse.ops import SELECTORS
from mmdynsparse.registry import MODELS as OWN_MODELS
from mmdynsparse.utils import convert_checkpoint

# Small models with the published places of the predictors, all stages as output.
SWIN = dict(embed_dims=24, depths=(2, 2, 6, 2), num_heads=(2, 3, 6, 6), drop_path_rate=0.0)
CONVNEXT = dict(
    arch=dict(depths=(1, 1, 6, 2), channels=(8, 16, 24, 32)),
    out_indices=(0, 1, 2, 3),
    gap_before_final_norm=False,
    layer_scale_init_value=1.0,
)
VIT = dict(img_size=64, embed_dims=32, num_layers=8, num_heads=4, out_indices=(1, 3, 5, 7))
CELLS = dict(cell_size=(4, 4, 2, 2))
RESNET = dict(base_channels=8, stem_channels=8, sparsity=CELLS)
LOW_RANK = dict(CELLS, fast_path=dict(type='mmdynsparse.LowRankFastPath', reduction=4))
BACKBONES = {
    'SparseSwinTransformer': SWIN,
    'SparseConvNeXt': CONVNEXT,
    'SparseVisionTransformer': VIT,
    'SparseLVViT': VIT,
    'SparseResNet': dict(RESNET, base_channels=16, stem_channels=16, depth=18, sparsity=LOW_RANK),
    'SparseResNetV1c': dict(RESNET, depth=50),
    'SparseResNetV1d': dict(RESNET, depth=50, style='caffe', dilations=(1, 1, 2, 4)),
}
# What keeps everything from learning, and the parameters that learn all the same.
FROZEN = dict.fromkeys(BACKBONES, (dict(frozen_stages=4), r'norm\d\.'))
FROZEN['SparseSwinTransformer'] = (dict(frozen_stages=4), 'nothing')
# Families whose dropped tokens leave the sequence.
VITS = ('SparseVisionTransformer', 'SparseLVViT')
FROZEN |= dict.fromkeys(VITS, (dict(frozen_exclude=('predictors',)), r'predictors\.'))
SIZES = [(1, (64, 999)), (2, (257, 383)), (3, (32, 40))]


@pytest.fixture(params=BACKBONES)
def build(request, randomize):
    """Function that builds a backbone with random weights, in eval mode."""

    def function(sparsity=None, **kwargs):
        cfg = dict(BACKBONES[request.param], type=f'mmdynsparse.{request.param}')
        parts = cfg.pop('sparsity', {})
        sparsity = parts | dict(keep_ratio=0.7) | (sparsity or {})
        return randomize(MODELS.build(dict(cfg, sparsity=sparsity, **kwargs))).eval()

    function.family = request.param
    return function


def max_diff(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def run_both(model, x):
    """Outputs and masks of masked and gathered execution."""
    outs, masks = [], []
    with torch.no_grad():
        for execution in ('masked', 'gather'):
            model.execution = execution
            torch.manual_seed(1)  # selector 'random' draws
            outs.append(model(x))
            masks.append([d.mask for d in model.decisions])
    return outs, masks


def test_every_backbone_is_here():
    OWN_MODELS.import_from_location()
    registered = {
        name for name, cls in OWN_MODELS.module_dict.items() if issubclass(cls, SparseBackbone)
    }
    assert registered == set(BACKBONES)


def dense_original(name):
    """The dense original with random weights, its features and its state dict in our names."""
    cfg = {k: v for k, v in BACKBONES[name].items() if k != 'sparsity'}
    if name == 'SparseConvNeXt':
        convnext = pytest.importorskip('timm').models.convnext.ConvNeXt
        dense = convnext(**dict(zip(('depths', 'dims'), cfg['arch'].values(), strict=True)))
        return dense, lambda x: dense.forward_intermediates(x, intermediates_only=True), 'timm'
    pytest.importorskip('mmseg.models')
    dense = MODELS.build(dict(cfg, type=f'mmseg.{OWN_MODELS.get(name).original}'))
    return dense, dense, 'mmseg'


# No library has LV-ViT.
@pytest.mark.parametrize('name', [name for name in BACKBONES if name != 'SparseLVViT'])
def test_keep_all_is_the_dense_original(name, randomize):
    dense, features, source = dense_original(name)
    randomize(dense, std=0.1).eval()
    cfg = dict(BACKBONES[name], type=f'mmdynsparse.{name}', sparsity=dict(keep_ratio=1.0))
    model = MODELS.build(cfg).eval()
    keys = model.load_state_dict(convert_checkpoint(dense.state_dict(), source), strict=False)
    assert keys.unexpected_keys == []
    assert all('predictors.' in k or 'fast_path.' in k for k in keys.missing_keys)
    x = torch.randn(2, 3, 97, 130)
    with torch.no_grad():
        expected = features(x)
        if source == 'timm':
            # timm's features are not normalized.
            expected = [getattr(model, f'norm{i}')(y) for i, y in enumerate(expected)]
        for execution in ('gather', 'masked'):
            model.execution = execution
            assert max_diff(model(x), expected) <= 1e-5


def test_what_is_frozen_does_not_learn(build):
    kwargs, exceptions = FROZEN[build.family]
    model = build(**kwargs).train()
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(re.match(exceptions, name) for name in learning)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize('batch, size', SIZES)
@pytest.mark.parametrize('selector', SELECTORS)
def test_masked_equals_gathered(build, batch, size, selector):
    model = build(sparsity=dict(selector=selector))
    outs, masks = run_both(model, torch.randn(batch, 3, *size))
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))
    assert max_diff(*outs) <= 1e-5


@pytest.mark.parametrize('shares', [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.0, 0.4, 1.0)])
def test_masked_equals_gathered_for_any_decision(build, shares, monkeypatch):
    """Nothing, a part and everything kept, in all or in some images of a batch."""

    def forced(scores, ratio):
        keep = torch.linspace(0, 0.999, scores.shape[1]) < torch.tensor(shares)[:, None]
        return (keep & (scores > -torch.inf)).float()

    monkeypatch.setitem(SELECTORS, 'mass', forced)
    model = build(sparsity=dict(selector='mass'))
    outs, masks = run_both(model, torch.randn(3, 3, 70, 90))
    assert masks[0][0].mean(1).tolist() == pytest.approx(shares, abs=0.1)
    assert max_diff(*outs) <= 1e-5


@pytest.mark.parametrize('cell_size', [None, (4, 3, 3, 1)])
def test_stages_may_share_a_decision(build, cell_size):
    block = 1 if 'ResNet' in build.family else 0
    options = dict(locations={i: (block,) for i in (1, 2, 3)}, follow=(2, 3), keep_ratio=0.5)
    if build.family in VITS:
        with pytest.raises(ValueError, match=r'cell_size must be None .* got'):
            build(sparsity=dict(cell_size=(4,)))
        return
    if cell_size or 'ResNet' not in build.family:
        options['cell_size'] = cell_size
    model = build(sparsity=options)
    outs, masks = run_both(model, torch.randn(2, 3, 190, 130))
    assert len(masks[0]) == 3 and len({m.shape for m in masks[0]}) > 1
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))
    assert max_diff(*outs) <= 1e-5
    own = [name for name, _ in model.named_parameters() if 'predictors.' in name]
    assert len({name.rsplit('predictors.')[0] for name in own}) == 1
    model.train()(torch.randn(2, 3, 190, 130))
    (grad,) = torch.autograd.grad(model.decisions[-1].mask.sum(), model.get_parameter(own[0]))
    assert grad.abs().max() > 0


def test_keep_ratio_changes_on_the_built_model(build):
    model = build()
    x = torch.randn(2, 3, 160, 160)
    for ratios in ([0.9, 0.5, 0.2], [1.0, 1.0, 1.0], [0.5, 0.5, 0.5]):
        model.set_keep_ratio(ratios)
        with torch.no_grad():
            model(x)
        kept = [d.mask.sum(1).tolist() for d in model.decisions]
        counts = [d.mask.shape[1] for d in model.decisions]
        assert kept == [[int(n * r)] * 2 for n, r in zip(counts, ratios, strict=True)]
    for bad in (0, 1.1, [0.5, 0.5], [0.5, 0.5, 2]):
        with pytest.raises(ValueError, match='keep_ratio'):
            model.set_keep_ratio(bad)
    assert model.keep_ratios == [0.5, 0.5, 0.5]


@pytest.mark.parametrize('keep_ratio', [0.7, 1.0])
@pytest.mark.parametrize('with_cp', [False, True])
def test_every_parameter_gets_a_gradient(build, keep_ratio, with_cp):
    model = build(sparsity=dict(keep_ratio=keep_ratio), with_cp=with_cp).train()
    sum(out.square().mean() for out in model(torch.randn(2, 3, 96, 96))).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert [name for name, grad in grads.items() if grad is None] == []
    if keep_ratio < 1:
        assert [name for name, grad in grads.items() if grad.abs().max() == 0] == []


MAGNITUDE = dict(predictor=dict(type='mmdynsparse.MagnitudeScore'), keep_ratio=0.5)


def test_scores_by_magnitude_have_nothing_to_learn(build):
    """They take a dense checkpoint as it is, and select the same cells in training."""
    model = build(sparsity=MAGNITUDE)
    assert not any('predictors.' in name for name in model.state_dict())
    outs, masks = run_both(model, torch.randn(3, 3, 97, 130))
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))
    assert max_diff(*outs) <= 1e-5
    counts = {int(d.mask.shape[1] * d.ratio) for d in model.decisions}
    assert counts == {int(m[0].sum()) for m in masks[0]}


def test_training_by_magnitude_gathers_where_it_can(build):
    """With the loss and the gradients of masked execution, stochastic depth included."""
    depth = {} if 'ResNet' in build.family else dict(drop_path_rate=0.4)
    losses, grads = [], []
    for execution in ('masked', *type(build()).executions[:-1]):
        model = build(sparsity=MAGNITUDE, **depth).train()
        model.execution = execution
        torch.manual_seed(1)
        loss = sum(out.square().mean() for out in model(torch.randn(4, 3, 96, 96)))
        loss.backward()
        losses.append(loss.detach())
        grads.append([p.grad for p in model.parameters()])
        if hasattr(model, '_plan'):
            stages = list(model.sparsity.locations)
            forms = {model._plan(model.decisions[0], stage).form for stage in stages}
            gathers = 'ResNet' not in build.family and execution != 'masked'
            assert forms == {'gather' if gathers else 'masked'}
    for loss, other in zip(losses[1:], grads[1:], strict=True):
        torch.testing.assert_close(loss, losses[0], atol=1e-5, rtol=1e-5)
        for a, b in zip(other, grads[0], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5 * b.abs().max().item() + 1e-7, rtol=1e-4)


def test_every_parameter_gets_a_gradient_in_a_dense_step(build):
    """As distributed training wants it; a fast path's is zero."""
    model = build(sparsity=dict(MAGNITUDE, keep_ratio=1.0)).train()
    sum(out.square().mean() for out in model(torch.randn(2, 3, 96, 96))).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_gradients_of_predictors_end_at_the_features(build):
    model = build().train()
    model(torch.randn(2, 3, 96, 96))
    sum(decision.mask.sum() for decision in model.decisions).backward()
    learning = [name for name, p in model.named_parameters() if p.grad is not None]
    assert learning and all('predictors.' in name for name in learning)


def test_checkpointing_changes_nothing(build):
    grads = []
    for with_cp in (False, True):
        model = build(with_cp=with_cp).train()
        torch.manual_seed(1)
        model(torch.randn(2, 3, 64, 64))[-1].square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_outputs_are_those_asked_for(build):
    # The first block of a ResNet's stage projects the identity and is always dense.
    block = 1 if 'ResNet' in build.family else 0
    model = build(out_indices=(0, 3), sparsity=dict(locations={0: (block,)}, keep_ratio=[0.5]))
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        outs = model(x)
    assert len(outs) == 2
    sum(out.sum() for out in model.train()(x)).backward()
    assert all(p.requires_grad == (p.grad is not None) for p in model.parameters())


@pytest.mark.parametrize('training', [False, True])
def test_maps_are_contiguous(build, training):
    """mmcv's RoIAlign, for one, gives wrong values for maps in another layout."""
    outs = build().train(training)(torch.randn(2, 3, 64, 96))
    assert all(out.is_contiguous() for out in outs)


def test_checkpoint_round_trip(build, tmp_path):
    models = [build(), build()]
    for p in models[1].parameters():
        torch.nn.init.zeros_(p)
    torch.save(models[0].state_dict(), tmp_path / 'model.pth')
    models[1].load_state_dict(torch.load(tmp_path / 'model.pth'))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert max_diff(*(model(x) for model in models)) == 0


def test_copies_and_pickles_after_training(build):
    model = build()
    x = torch.randn(1, 3, 64, 64)
    model.train()(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.decisions == ()
        with torch.no_grad():
            assert max_diff(model.eval()(x), twin.eval()(x)) == 0


def test_a_copy_of_a_compiled_backbone_runs_its_own_weights(build):
    model = build()
    model.compile(backend='eager')
    torch._dynamo.reset()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        twin = copy.deepcopy(model)
        for p in model.parameters():
            p.zero_()
        assert max_diff(twin(x), before) <= 1e-5
        assert max_diff(model(x), before) > 1e-2


@pytest.mark.parametrize('sparsity', [0.7, [0.7], 'sparse'])
def test_sparsity_is_a_dict(build, sparsity):
    cfg = {k: v for k, v in BACKBONES[build.family].items() if k != 'sparsity'}
    with pytest.raises(ValueError, match='sparsity must be None or a dict with the keys'):
        MODELS.build(dict(cfg, type=f'mmdynsparse.{build.family}', sparsity=sparsity))


def test_parts_start_as_they_say(build):
    """A light branch starts at zero, whatever a family does with its linear layers."""
    if build.family in VITS:
        return  # it has no paths
    model = build(sparsity=dict(fast_path=dict(type='mmdynsparse.LowRankFastPath', reduction=4)))
    model.init_weights()
    paths = [m for m in model.modules() if isinstance(m, LowRankFastPath)]
    assert paths
    for path in paths:
        assert path.fc2.weight.abs().max() == path.fc2.bias.abs().max() == 0
        assert path.fc1.weight.abs().max() > 0


def test_bfloat16(build):
    model = build()
    x = torch.randn(1, 3, 64, 64)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        outs = model.train()(x)
    assert all(d.mask.dtype == d.scores.dtype == torch.float32 for d in model.decisions)
    sum(o.float().mean() for o in outs).backward()
    with torch.no_grad():
        assert model.eval().bfloat16()(x.bfloat16())[-1].dtype == torch.bfloat16


@torch.no_grad()
def test_masked_equals_gathered_under_autocast(build):
    """Parameters are float32 then; random decisions do not depend on rounding."""
    for fast_path in ({}, dict(fast_path=dict(type='mmdynsparse.LinearFastPath', layer_scale=0.5))):
        if fast_path and build.family in VITS:
            continue  # it has no fast path
        model = build(sparsity=dict(selector='random', keep_ratio=0.5, **fast_path))
        with torch.autocast('cpu', dtype=torch.bfloat16):
            outs, masks = run_both(model, torch.randn(2, 3, 97, 130))
        assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))
        for masked, gathered in zip(*outs, strict=True):
            assert masked.dtype == gathered.dtype
            size = masked.abs().max().item()
            torch.testing.assert_close(gathered, masked, atol=0.03 * size, rtol=0)


def test_nan_input_is_refused_at_inference(build):
    with pytest.raises(ValueError, match='NaN'):
        build()(torch.full((1, 3, 64, 64), float('nan')))


def test_training_without_ratio_loss_warns_once(build, monkeypatch):
    messages = []
    target = 'mmdynsparse.models.decider.print_log'
    monkeypatch.setattr(target, lambda text, **kwargs: messages.append(text))
    model = build().train()
    for _ in range(2):
        model(torch.randn(1, 3, 64, 64))
    assert len(messages) == 1 and 'SparsityHook' in messages[0]
