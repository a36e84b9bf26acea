import pytest
import torch

from mmdynsparse.analysis import count_macs
from mmdynsparse.models import SparseConvNeXt
from mmdynsparse.utils import convert_checkpoint

TINY = dict(depths=(1, 1, 4, 2), channels=(8, 16, 24, 32))
SPARSE = dict(keep_ratio=0.7)
MAPS = dict(out_indices=(0, 1, 2, 3), gap_before_final_norm=False)
SIZES = [(224, 224), (257, 383), (64, 999), (32, 40)]


def sparse(randomize, **kwargs):
    kwargs = dict(arch=TINY, sparsity=SPARSE, layer_scale_init_value=1.0, **MAPS) | kwargs
    return randomize(SparseConvNeXt(**kwargs)).eval()


def max_diff(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


@pytest.fixture(scope='module')
def timm_convnext():
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    model = timm.models.convnext.ConvNeXt(
        depths=TINY['depths'], dims=TINY['channels'], num_classes=5, ls_init_value=1.0
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


@pytest.mark.parametrize('size', SIZES)
def test_keep_all_equals_timm(size, timm_convnext):
    ours = SparseConvNeXt(TINY, **MAPS, sparsity=dict(keep_ratio=1.0)).eval()
    state = convert_checkpoint(timm_convnext.state_dict(), 'timm')
    keys = ours.load_state_dict(state, strict=False)
    assert keys.unexpected_keys == []
    assert all('predictors.' in k or '.fast_path.' in k for k in keys.missing_keys)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = timm_convnext.forward_intermediates(x, intermediates_only=True)
        last = timm_convnext.head.norm(timm_convnext.forward_features(x))
        for execution in ('gather', 'masked'):
            ours.execution = execution
            outs = ours(x)
            assert max_diff(outs[-1:], [last]) <= 1e-5
            # The converter leaves the norms of earlier outputs at identity.
            normed = [ours.get_submodule(f'norm{i}')(m) for i, m in enumerate(expected[:3])]
            assert max_diff(outs[:3], normed) <= 1e-5


@pytest.mark.parametrize(
    'arch, published',
    [('tiny', (3.59, 3.92)), ('small', (5.79, 6.78)), ('base', (10.21, 11.96))],
)
def test_multiply_adds_are_the_published_ones(arch, published):
    """GMACs at 224 x 224 with a 1000-class head, keep ratios 0.7 and 0.9, within 1%."""
    model = SparseConvNeXt(arch, sparsity=SPARSE).eval()
    head = 1000 * model.stages[3][0].gamma.numel()
    for ratio, expected in zip((0.7, 0.9), published, strict=True):
        model.set_keep_ratio(ratio)
        macs = count_macs(model, torch.randn(1, 3, 224, 224)) + head
        assert macs / 1e9 == pytest.approx(expected, rel=0.01)


def test_published_dynamic_cnn(recorded):
    """Every recorded tensor within 1e-4, and the same kept sets."""
    record = torch.load(recorded / 'oracle' / 'dynamic_convnext.pth', weights_only=True)
    config, expected = record['config'], record['eval']
    model = SparseConvNeXt(
        dict(depths=config['depths'], channels=config['dims']),
        sparsity=dict(locations={2: config['pruning_loc']}, keep_ratio=config['sparse_ratio']),
    ).eval()
    keys = model.load_state_dict(convert_checkpoint(record['state_dict'], 'dynamicvit'))
    assert keys.missing_keys == keys.unexpected_keys == []
    taps = []
    model.downsample_layers[3].register_forward_hook(lambda m, args, out: taps.append(out))
    with torch.no_grad():
        (norm,) = model(record['input'])
    torch.testing.assert_close(taps[0], expected['tap.downsample_layers.3'], atol=1e-4, rtol=0)
    torch.testing.assert_close(norm, expected['tap.norm'], atol=1e-4, rtol=0)
    for i, decision in enumerate(model.decisions):
        scores = expected[f'predictor{i}.log_probs'][:, 0].flatten(1)
        torch.testing.assert_close(decision.scores, scores, atol=1e-4, rtol=0)
        count = int(scores.shape[1] * config['sparse_ratio'][i])
        kept = scores.argsort(dim=1, descending=True)[:, :count].sort(1).values
        ours = decision.mask.nonzero()[:, 1].view(len(scores), count)
        assert torch.equal(ours, kept)


@pytest.mark.parametrize('frozen', [0, 1, 3])
@pytest.mark.parametrize('out_indices', [(2,), (0, 1, 2, 3)])
def test_frozen_and_unused_stages_have_no_gradient(frozen, out_indices, randomize):
    model = sparse(randomize, frozen_stages=frozen, out_indices=out_indices)
    assert model.train() is model
    for i, (downsample, stage) in enumerate(
        zip(model.downsample_layers, model.stages, strict=True)
    ):
        assert stage.training == downsample.training == (i >= frozen)
        learns = frozen <= i <= max(out_indices)
        assert all(
            p.requires_grad == learns for p in (*downsample.parameters(), *stage.parameters())
        )
    assert all(p.requires_grad == (frozen < 3) for p in model.predictors.parameters())
    sum(out.sum() for out in model(torch.randn(1, 3, 64, 64))).backward()
    assert all(p.requires_grad == (p.grad is not None) for p in model.parameters())


def test_pooled_output_and_negative_indices(randomize):
    model = sparse(randomize, out_indices=-1, gap_before_final_norm=True)
    assert [tuple(o.shape) for o in model(torch.randn(2, 3, 64, 64))] == [(2, 32)]


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(arch='huge2'), "arch must be one of .*got 'huge2'"),
        (dict(arch=dict(depths=(1,))), 'depths and channels'),
        (dict(norm_cfg=dict(type='BN')), "must be 'LN2d', got 'BN'"),
        (dict(linear_pw_conv=False), 'linear_pw_conv must be True, got False'),
        (dict(use_grn=True), 'use_grn must be False, got True'),
        (dict(out_indices=(0, 4)), r'out_indices must be in -4 to 3, got \(0, 4\)'),
        (dict(out_indices=0, sparsity=SPARSE), 'up to the last output, 0, got stage 2'),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SparseConvNeXt(**{'arch': TINY, **kwargs})


@torch.no_grad()
def test_next_to_nothing_dropped_is_computed_and_masked(randomize):
    model = sparse(randomize, sparsity=dict(keep_ratio=[0.97] * 3, fast_path=None))
    x = torch.randn(2, 3, 224, 224)
    dense = count_macs(model, x)
    gathered = model(x)
    assert all(d.mask.mean() < 1 for d in model.decisions)
    model.execution = 'masked'
    assert count_macs(model, x) == dense and max_diff(gathered, model(x)) == 0
    model.execution = 'gather'
    model.set_keep_ratio([0.9] * 3)
    assert count_macs(model, x) < dense
