import pytest
import torch

from mmdynsparse.analysis import count_macs
from mmdynsparse.models import SparseSwinTransformer
from mmdynsparse.ops import SELECTORS, cell_mask

SIZES = [(224, 224), (257, 383), (64, 999), (30, 30), (4, 4), (1, 5)]
SPARSE = dict(keep_ratio=0.7)
ALL_STAGES = {0: (0,), 1: (1,), 2: (0, 2, 3), 3: (0,)}
# Sparse attention for tokens, for windows, and for one decision that all stages share.
ATTENTION = [
    dict(attention=True, locations=ALL_STAGES),
    dict(attention=True, locations=ALL_STAGES, cell_size=(7, 7, 7, 7)),
    dict(attention=True, locations=ALL_STAGES, cell_size=(12, 6, 3, 1), follow=(1, 3)),
    dict(attention=True, locations=ALL_STAGES, cell_size=(4, 1, 2, 2), fast_path=None, follow=(1,)),
]


def original(package, **kwargs):
    """Build the dense original of mmseg or mmdet in eval mode."""
    backbones = pytest.importorskip(f'{package}.models.backbones')
    model = backbones.SwinTransformer(**kwargs)
    model.train(False)
    return model


def sparse(tiny_swin, randomize, **kwargs):
    model = SparseSwinTransformer(**{**tiny_swin, 'sparsity': SPARSE, **kwargs})
    return randomize(model).eval()


class LeftHalf(torch.nn.Module):
    """A predictor that prefers the left half of a square map."""

    def forward(self, x_BNC):
        side = int(x_BNC.shape[1] ** 0.5)
        logits = torch.where(torch.arange(side) < side // 2, 2.0, -2.0).repeat(len(x_BNC), side)
        return torch.stack((logits, -logits), -1).log_softmax(-1)


def pattern(batch, height, width):
    """Images of which windows differ, so that predictors with random weights keep some of them."""
    return torch.nn.functional.interpolate(torch.randn(batch, 3, 5, 7), (height, width))


def max_diff(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


# --- everything kept: the dense original ---------------------------------------------------------


@pytest.mark.parametrize('package', ['mmseg', 'mmdet'])
@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('sparsity', [{}, ATTENTION[2]])
def test_keep_all_equals_the_original(package, size, sparsity, tiny_swin, randomize):
    dense = randomize(original(package, **tiny_swin))
    ours = SparseSwinTransformer(**tiny_swin, sparsity=dict(sparsity, keep_ratio=1.0)).eval()
    keys = ours.load_state_dict(dense.state_dict(), strict=False)
    assert not keys.unexpected_keys
    assert all('predictors' in k or 'fast_path' in k for k in keys.missing_keys)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        for execution in ('gather', 'masked'):
            ours.execution = execution
            assert max_diff(dense(x), ours(x)) <= 1e-5


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(patch_norm=False, qkv_bias=False, qk_scale=0.3),
        dict(window_size=4, mlp_ratio=2.5, norm_cfg=dict(type='LN', eps=1e-3)),
        dict(act_cfg=dict(type='ReLU'), strides=(4, 2, 1, 2), out_indices=(1, 3)),
        dict(patch_size=2, strides=(2, 2, 2, 2), in_channels=1),
    ],
)
def test_arguments_mean_what_they_mean_in_mmseg(kwargs, tiny_swin, randomize):
    dense = randomize(original('mmseg', **tiny_swin, **kwargs))
    ours = SparseSwinTransformer(**tiny_swin, **kwargs, sparsity=dict(keep_ratio=1.0)).eval()
    assert not ours.load_state_dict(dense.state_dict(), strict=False).unexpected_keys
    x = torch.randn(1, kwargs.get('in_channels', 3), 65, 100)
    with torch.no_grad():
        assert max_diff(dense(x), ours(x)) <= 1e-5


@pytest.mark.parametrize('sparsity', [{}, ATTENTION[2]])
def test_training_at_ratio_one_is_dense_too(sparsity, tiny_swin, randomize):
    kwargs = dict(tiny_swin, drop_path_rate=0.0)
    dense = randomize(original('mmseg', **kwargs))
    ours = SparseSwinTransformer(**kwargs, sparsity=dict(sparsity, keep_ratio=1.0))
    ours.load_state_dict(dense.state_dict(), strict=False)
    x = torch.randn(2, 3, 64, 64)
    assert max_diff(dense(x), ours.train()(x)) <= 1e-5


def test_without_sparsity_the_state_dict_is_the_original(tiny_swin):
    dense = original('mmdet', **tiny_swin).state_dict()
    ours = SparseSwinTransformer(**tiny_swin).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in dense.items()}


@pytest.mark.parametrize(
    'kwargs, published',
    [
        (dict(), 4.06),
        (dict(depths=(2, 2, 18, 2)), 6.88),
        (dict(embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)), 12.10),
    ],
)
def test_multiply_adds_are_the_published_ones(kwargs, published):
    """GMACs at 224 x 224 and keep ratio 0.7, a 1000-class head added, within 1%."""
    model = SparseSwinTransformer(**kwargs, sparsity=SPARSE).eval()
    macs = count_macs(model, torch.randn(1, 3, 224, 224)) + 1000 * model.num_features[-1]
    assert macs / 1e9 == pytest.approx(published, rel=0.01)


# --- two executions, one meaning -----------------------------------------------------------------


@pytest.mark.parametrize('selector', SELECTORS)
@pytest.mark.parametrize(
    'batch, size', [(1, (64, 999)), (2, (257, 383)), (3, (30, 30)), (2, (4, 4))]
)
def test_masked_equals_gathered(batch, size, selector, tiny_swin, randomize):
    locations = {0: (1,), 2: (1, 2, 3), 3: (0,)}
    sparsity = dict(keep_ratio=0.7, locations=locations, selector=selector)
    model = sparse(tiny_swin, randomize, sparsity=sparsity)
    x = torch.randn(batch, 3, *size)
    outs, masks = [], []
    with torch.no_grad():
        for execution in ('masked', 'gather'):
            model.execution = execution
            torch.manual_seed(1)  # selector 'random' draws
            outs.append(model(x))
            masks.append([d.mask for d in model.decisions])
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))
    assert max_diff(*outs) <= 1e-5


@pytest.mark.parametrize('fast_path', [None, dict(type='mmdynsparse.LinearFastPath')])
@pytest.mark.parametrize('counts', ['none', 'all', 'uneven'])
def test_masked_equals_gathered_for_any_decision(
    counts, fast_path, tiny_swin, randomize, monkeypatch
):
    def forced(scores, ratio):
        share = dict(none=[0.0] * 3, all=[1.0] * 3, uneven=[0.0, 0.4, 1.0])[counts]
        return (torch.linspace(0, 0.999, scores.shape[1]) < torch.tensor(share)[:, None]).float()

    monkeypatch.setitem(SELECTORS, 'mass', forced)
    sparsity = dict(keep_ratio=0.7, selector='mass', fast_path=fast_path)
    model = sparse(tiny_swin, randomize, sparsity=sparsity)
    x = torch.randn(3, 3, 70, 90)
    outs = []
    with torch.no_grad():
        for execution in ('masked', 'gather'):
            model.execution = execution
            outs.append(model(x))
    assert max_diff(*outs) <= 1e-5


@pytest.mark.parametrize('options', [{}, *ATTENTION])
def test_training_gradients_agree_with_gathered_execution(options, tiny_swin, randomize):
    """For one decision the parameters of both paths get the same gradient either way."""
    model = sparse(tiny_swin, randomize, sparsity=SPARSE | options)
    x = torch.randn(2, 3, 96, 96)
    grads = []
    for execution in ('masked', 'gather'):
        model.execution = execution
        model.zero_grad()
        model(x)[-1].square().mean().backward()
        named = model.stages[2].blocks.named_parameters()
        grads.append({k: p.grad.clone() for k, p in named})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize('options', ATTENTION)
@pytest.mark.parametrize('selector', ['topk', 'threshold'])
@pytest.mark.parametrize('size', [(224, 224), (257, 383), (40, 130)])
def test_masked_equals_gathered_with_sparse_attention(
    options, selector, size, tiny_swin, randomize
):
    model = sparse(tiny_swin, randomize, sparsity=dict(SPARSE, selector=selector, **options))
    x = pattern(2, *size)
    outs, masks = [], []
    with torch.no_grad():
        for execution in ('masked', 'gather'):
            model.execution = execution
            outs.append(model(x))
            masks.append([d.mask for d in model.decisions])
    assert len(masks[0]) == 6
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))
    assert max_diff(*outs) <= 1e-5


@pytest.mark.parametrize('options', ATTENTION)
@pytest.mark.parametrize('shares', [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.0, 0.4, 1.0)])
def test_sparse_attention_for_any_decision(options, shares, tiny_swin, randomize, monkeypatch):
    def forced(scores, ratio):
        return (torch.linspace(0, 0.999, scores.shape[1]) < torch.tensor(shares)[:, None]).float()

    monkeypatch.setitem(SELECTORS, 'mass', forced)
    model = sparse(tiny_swin, randomize, sparsity=dict(SPARSE, selector='mass', **options))
    x = pattern(3, 150, 190)
    outs = []
    with torch.no_grad():
        for execution in ('masked', 'gather'):
            model.execution = execution
            outs.append(model(x))
    assert max_diff(*outs) <= 1e-5


@pytest.mark.parametrize('block', [0, 1])
def test_dropped_tokens_get_no_attention(block, tiny_swin, randomize):
    """Without a fast path they stay as they are; windows with kept tokens still read them."""
    options = dict(attention=True, fast_path=None, locations={0: (block,)}, cell_size=(7, 1, 1, 1))
    kwargs = dict(depths=(block + 1, 1, 1, 1), out_indices=(0,))
    model = sparse(tiny_swin, randomize, sparsity=dict(SPARSE, **options, keep_ratio=0.5), **kwargs)
    model.norm0 = torch.nn.Identity()
    dense = SparseSwinTransformer(**(tiny_swin | kwargs)).eval()
    dense.load_state_dict(model.state_dict(), strict=False)
    dense.norm0 = torch.nn.Identity()
    before = []
    dense.stages[0].blocks[block].register_forward_hook(lambda m, args, out: before.append(args[0]))
    x = pattern(2, 160, 130)
    with torch.no_grad():
        (out,), (full,) = model(x), dense(x)
    (decision,) = model.decisions
    kept = cell_mask(decision.mask, out.shape[2:], 7).expand_as(out) > 0
    unchanged = before[0].transpose(1, 2).view_as(out)
    assert torch.equal(out[~kept], unchanged[~kept])
    torch.testing.assert_close(out[kept], full[kept], atol=1e-5, rtol=0)
    assert (full[~kept] - unchanged[~kept]).abs().max() > 1e-3


def test_windows_without_a_kept_token_cost_nothing(tiny_swin, randomize):
    """Cells are windows of the first block; those of the second are shifted."""
    options = dict(attention=True, fast_path=None, locations={0: (0,)}, cell_size=(7, 1, 1, 1))
    x = torch.randn(1, 3, 224, 224)
    costs = {}
    for depth in (0, 1, 2):
        kwargs = dict(depths=(depth, 1, 1, 1), out_indices=(0,))
        for ratio in (0.5, 1.0):
            sparsity = dict(options, keep_ratio=ratio) if depth else None
            model = sparse(tiny_swin, randomize, sparsity=sparsity, **kwargs)
            if depth:
                model.stages[0].predictors[0] = LeftHalf().eval()
            costs[depth, ratio] = count_macs(model, x)
    first = {r: costs[1, r] - costs[0, r] for r in (0.5, 1.0)}
    assert first[0.5] == first[1.0] / 2
    # Shifted windows: what lies between kept and dropped cells attends as well.
    second = {r: costs[2, r] - costs[1, r] for r in (0.5, 1.0)}
    assert second[1.0] / 2 < second[0.5] < second[1.0] * 0.65


# --- decisions and keep ratios --------------------------------------------------------------------


def test_decisions_of_the_last_forward(tiny_swin, randomize):
    model = sparse(tiny_swin, randomize)
    for size, hw in (((64, 96), (4, 6)), ((224, 224), (14, 14))):
        model(torch.randn(2, 3, *size))
        assert [d.hw for d in model.decisions] == [hw] * 3
        n = hw[0] * hw[1]
        kept = [d.mask.sum(1).tolist() for d in model.decisions]
        assert kept == [[int(n * r)] * 2 for r in (0.7, 0.5, 0.3)]


def test_dense_model_has_no_keep_ratio(tiny_swin):
    with pytest.raises(ValueError, match='sparse backbone'):
        SparseSwinTransformer(**tiny_swin).set_keep_ratio(0.5)


def test_execution_is_checked(tiny_swin):
    with pytest.raises(ValueError, match=r"one of \('gather', 'triton', 'masked'\), got 'sparse'"):
        SparseSwinTransformer(**tiny_swin).execution = 'sparse'


def test_decisions_for_cells(tiny_swin, randomize):
    model = sparse(tiny_swin, randomize, sparsity=dict(SPARSE, cell_size=(7, 7, 4, 1)))
    model(torch.randn(2, 3, 160, 190))
    assert [d.grid for d in model.decisions] == [(3, 3)] * 3
    assert [d.hw for d in model.decisions] == [(10, 12)] * 3
    kept = [d.mask.sum(1).tolist() for d in model.decisions]
    assert kept == [[int(9 * r)] * 2 for r in (0.7, 0.5, 0.3)]


def test_a_stage_that_follows_keeps_the_same_places(tiny_swin, randomize):
    locations = {0: (0,), 1: (0,), 3: (1,)}
    options = dict(locations=locations, follow=(1, 3), keep_ratio=0.5)
    model = sparse(tiny_swin, randomize, sparsity=options)
    assert [len(stage.predictors) for stage in model.stages] == [1, 0, 0, 0]
    assert [stage.blocks[1].fast_path is not None for stage in model.stages] == [1, 1, 0, 1]
    model.stages[0].predictors[0] = LeftHalf().eval()
    with torch.no_grad():
        model(torch.randn(2, 3, 256, 256))
    assert [d.hw for d in model.decisions] == [(64, 64), (32, 32), (8, 8)]
    for decision in model.decisions:
        mask = decision.mask.view(2, *decision.hw)
        assert mask[..., : decision.hw[1] // 2].min() == 1 and mask.mean() == 0.5


def test_the_predictor_learns_from_the_stages_that_follow(tiny_swin, randomize):
    options = dict(locations={0: (0,), 3: (0,)}, follow=(3,), keep_ratio=0.5)
    model = sparse(tiny_swin, randomize, sparsity=options).train()
    model(torch.randn(1, 3, 96, 96))
    follower = model.decisions[1]
    assert follower.mask.unique().tolist() == [0, 1]
    follower.mask.sum().backward()
    grads = [p.grad for p in model.stages[0].predictors.parameters()]
    assert all(grad.abs().max() > 0 for grad in grads)


@pytest.mark.parametrize('frozen, sampled', [(1, [False, True]), (4, [False, False])])
def test_frozen_stages_select(frozen, sampled, tiny_swin, randomize):
    options = dict(locations={0: (0,), 3: (0,)}, follow=(3,), keep_ratio=0.5)
    model = sparse(tiny_swin, randomize, sparsity=options, frozen_stages=frozen).train()
    model(torch.randn(1, 3, 64, 64))
    assert [d.count is None for d in model.decisions] == sampled


def test_small_maps_are_shifted_as_the_model_says_unless_the_checkpoint_does(tiny_swin):
    def shifts(model):
        return {block.attn.shift_small_maps for stage in model.stages for block in stage.blocks}

    model = SparseSwinTransformer(**tiny_swin, shift_small_maps=False)
    shifted = SparseSwinTransformer(**tiny_swin)
    assert shifts(model) == {False} and shifts(shifted) == {True}
    model.load_state_dict(dict(shifted.state_dict()))
    model.load_state_dict({}, strict=False)
    assert shifts(model) == {False}
    model.load_state_dict(shifted.state_dict())
    assert shifts(model) == {True} and model.shift_small_maps


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize('frozen', [-1, 0, 1, 3])
def test_frozen_stages(frozen, tiny_swin):
    model = SparseSwinTransformer(**tiny_swin, sparsity=SPARSE, frozen_stages=frozen)
    parts = [model.patch_embed, *model.stages]
    # The runner wraps the model for distributed training before it calls train().
    for i, part in enumerate(parts):
        assert all(p.requires_grad == (i > frozen) for p in part.parameters())
    assert model.train() is model
    for i, part in enumerate(parts):
        assert part.training == (i > frozen)
    assert model(torch.randn(1, 3, 64, 64))[-1].requires_grad
    # A frozen stage selects as at inference, gathered.
    selected = [d.count is not None and not d.mask.requires_grad for d in model.decisions]
    assert selected == [frozen == 3] * 3


def test_absolute_position_embedding_fits_any_input(tiny_swin, randomize):
    kwargs = dict(tiny_swin, use_abs_pos_embed=True, pretrain_img_size=64)
    dense = randomize(original('mmseg', **kwargs))
    ours = SparseSwinTransformer(**kwargs, sparsity=dict(keep_ratio=1.0)).eval()
    assert not ours.load_state_dict(dense.state_dict(), strict=False).unexpected_keys
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert max_diff(dense(x), ours(x)) <= 1e-5
        assert ours(torch.randn(1, 3, 50, 93))[0].shape[-2:] == (13, 24)


@pytest.mark.parametrize('out_indices', [(3,), (0, 2), (2,), (0, 1, 2, 3)])
def test_out_indices(out_indices, tiny_swin, randomize):
    model = sparse(tiny_swin, randomize, out_indices=out_indices)
    with torch.no_grad():
        outs = model(torch.randn(1, 3, 64, 96))
    shapes = [(1, 24 * 2**i, 16 // 2**i, 24 // 2**i) for i in out_indices]
    assert [tuple(o.shape) for o in outs] == shapes
    sum(out.sum() for out in model.train()(torch.randn(1, 3, 64, 96))).backward()
    assert all(p.requires_grad == (p.grad is not None) for p in model.stages.parameters())


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(strides=(2, 2, 2, 2)), r'strides\[0\] must equal patch_size 4, got 2'),
        (dict(out_indices=(0, 4)), r'out_indices must be in 0 to 3, got \(0, 4\)'),
        (dict(out_indices=()), r'out_indices must be in 0 to 3, got \(\)'),
        (dict(frozen_stages=5), r'frozen_stages must be in -1 to 4, got 5'),
        (dict(out_indices=(0, 1), sparsity=SPARSE), 'up to the last output, 1, got stage 2'),
        (dict(init_cfg=dict(type='Normal')), 'init_cfg must be'),
        (dict(sparsity=dict(keep_ratio=2)), 'keep_ratio'),
        (dict(pretrained=3), 'pretrained must be a str'),
        (dict(sparsity=dict(SPARSE, follow=(2,))), r'sparsity.follow takes .* got \(2,\)'),
        (dict(sparsity=dict(SPARSE, cell_size=(7, 7))), r'each of 4 stages, got \(7, 7\)'),
        (dict(sparsity=dict(SPARSE, attention=1)), 'True or False, got 1'),
    ],
)
def test_bad_arguments(kwargs, message, tiny_swin):
    with pytest.raises(ValueError, match=message):
        SparseSwinTransformer(**{**tiny_swin, **kwargs})
