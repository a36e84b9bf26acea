"""Execution in Triton kernels has the meaning of the others; here in Triton's interpreter."""

import pytest
import torch

from mmdynsparse.models import SparseConvNeXt, SparseResNet, SparseSwinTransformer
from mmdynsparse.models.backbones import SparseVisionTransformer

SPARSE = dict(keep_ratio=0.5, locations={1: (1,), 2: (1,)})
LOW_RANK = dict(type='mmdynsparse.LowRankFastPath', reduction=4)
SWIN = dict(embed_dims=16, depths=(1, 2, 2), num_heads=(1, 2, 2), strides=(4, 2, 2))
SWIN = dict(SWIN, out_indices=(0, 1, 2))
CONVNEXT = dict(
    arch=dict(depths=(1, 2, 2), channels=(16, 16, 32)),
    out_indices=(0, 1, 2),
    gap_before_final_norm=False,
)
RESNET = dict(base_channels=16, num_stages=3, out_indices=(0, 1, 2))
RESNET = dict(RESNET, strides=(1, 2, 2), dilations=(1, 1, 1))
CELLS = dict(SPARSE, cell_size=(4, 4, 2))
MODELS = {
    'swin': lambda **kw: SparseSwinTransformer(**SWIN, sparsity=SPARSE | kw),
    'convnext': lambda **kw: SparseConvNeXt(**CONVNEXT, sparsity=SPARSE | kw),
    'r18': lambda **kw: SparseResNet(18, **RESNET, sparsity=CELLS | kw),
    'r50': lambda **kw: SparseResNet(50, **RESNET, sparsity=CELLS | kw),
}


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('fast', [True, False])
@torch.no_grad()
def test_equals_gathered(name, fast, randomize, interpreted):
    if fast:
        parts = dict(fast_path=LOW_RANK) if name.startswith('r') else {}
    else:
        parts = dict(fast_path=None)
    model = randomize(MODELS[name](**parts), std=0.1).eval()
    x = torch.randn(2, 3, 70, 90)
    expected = model(x)
    model.execution = 'triton'
    for out, ref in zip(model(x), expected, strict=True):
        torch.testing.assert_close(out, ref, atol=1e-4, rtol=1e-4)
    assert 0.4 < model.decisions[0].mask.mean() <= 0.5


@pytest.mark.parametrize('name', MODELS)
@torch.no_grad()
def test_autocast(name, randomize, interpreted):
    """Parameters are float32 then, activations are not; layers that scale make them float32."""
    scaled = dict(type='mmdynsparse.LinearFastPath', layer_scale=0.5)
    # Random decisions do not depend on rounding.
    model = randomize(MODELS[name](fast_path=scaled, selector='random'), std=0.1).eval()
    x = torch.randn(2, 3, 70, 90)
    outs = []
    for execution in ('masked', 'gather', 'triton'):
        model.execution = execution
        torch.manual_seed(1)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            outs.append(model(x))
    for masked, gathered, fused in zip(*outs, strict=True):
        assert masked.dtype == gathered.dtype == fused.dtype
        size = masked.abs().max().item()
        torch.testing.assert_close(gathered, masked, atol=0.02 * size, rtol=0)
        torch.testing.assert_close(fused, masked, atol=0.04 * size, rtol=0)


@pytest.mark.parametrize('name', ['swin', 'convnext'])
@torch.no_grad()
def test_other_fast_paths_are_refused(name, interpreted):
    model = MODELS[name](fast_path=LOW_RANK).eval()
    model.execution = 'triton'
    message = "must be LinearFastPath or None with execution 'triton', got LowRankFastPath"
    with pytest.raises(ValueError, match=message):
        model(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize('name', ['r18', 'r50'])
@torch.no_grad()
def test_adapters_are_refused_in_a_fused_convolution(name, randomize, interpreted):
    model = MODELS[name]().eval()
    model.execution = 'triton'
    model.layer2[1].conv2.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(ValueError, match=r"conv2 and its norm must be .* execution 'triton', got"):
        model(torch.randn(1, 3, 64, 64))


@torch.no_grad()
def test_trains_masked_all_the_same(randomize):
    model = randomize(MODELS['swin']()).train()
    model.execution = 'triton'
    assert len(model(torch.randn(1, 3, 64, 64))) == 3


def test_is_refused_where_there_is_no_kernel():
    model = SparseVisionTransformer(64, embed_dims=16, num_layers=4, num_heads=2)
    with pytest.raises(ValueError, match=r"one of \('gather', 'masked'\), got 'triton'"):
        model.execution = 'triton'


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(act_cfg=dict(type='ReLU')), 'the activation must be GELU for fused kernels'),
        (dict(act_cfg=dict(type='GELU', approximate='tanh')), 'the activation must be GELU'),
    ],
)
@torch.no_grad()
def test_other_activations_are_refused(kwargs, message, interpreted):
    model = SparseSwinTransformer(**SWIN, **kwargs, sparsity=SPARSE).eval()
    model.execution = 'triton'
    with pytest.raises(ValueError, match=message):
        model(torch.randn(1, 3, 64, 64))
