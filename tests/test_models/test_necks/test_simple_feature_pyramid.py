"""SimpleFeaturePyramid alone and behind a sparse vision transformer."""

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import nn

from mmdynsparse.models import SparseVisionTransformer

pytest.importorskip('mmdet')

VIT = dict(img_size=64, embed_dims=16, num_layers=4, num_heads=2)


def build(**kwargs):
    neck = dict(dict(in_channels=16, out_channels=8), **kwargs)
    return MODELS.build(dict(neck, type='mmdynsparse.SimpleFeaturePyramid')).eval()


def normalize(x, norm):
    x = x - x.mean(1, keepdim=True)
    x = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return x * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)


@torch.no_grad()
def test_levels_are_those_of_the_paper(randomize):
    """Deconvolutions, a norm and GELU between two, or pooling; then two convolutions with norms."""
    neck = randomize(build())
    x = torch.randn(2, 16, 6, 4)
    outs = neck((torch.randn(2, 16, 6, 4), x))
    quarter, half, same, double = neck.levels
    y = F.gelu(normalize(quarter[0](x), quarter[1]))
    starts = (quarter[3](y), half[0](x), x, F.max_pool2d(x, 2))
    levels = (quarter[4:], half[1:], same, double[1:])
    for start, (conv1, norm1, conv2, norm2), out in zip(starts, levels, outs[:4], strict=True):
        expected = F.conv2d(
            normalize(F.conv2d(start, conv1.weight), norm1), conv2.weight, padding=1
        )
        torch.testing.assert_close(out, normalize(expected, norm2), atol=1e-4, rtol=1e-4)
    assert torch.equal(outs[4], outs[3][:, :, ::2, ::2])
    assert [tuple(out.shape[2:]) for out in outs] == [(24, 16), (12, 8), (6, 4), (3, 2), (2, 1)]
    kernels = [tuple(m.weight.shape) for m in neck.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert kernels == [(16, 8, 2, 2), (8, 4, 2, 2), (16, 8, 2, 2)]


@pytest.mark.parametrize('training', [False, True])
def test_maps_are_contiguous_and_carry_no_decisions(training):
    vit = SparseVisionTransformer(**VIT, sparsity=dict(keep_ratio=0.5)).train(training)
    maps = vit(torch.randn(1, 3, 64, 96))
    outs = build().train(training)(maps)
    assert len(maps.decisions) == 3
    assert type(outs) is tuple and len(outs) == 5
    assert all(out.is_contiguous() and not hasattr(out, 'decisions') for out in outs)


def test_every_parameter_learns():
    neck = build().train()
    sum(out.square().mean() for out in neck((torch.randn(1, 16, 4, 4),))).backward()
    assert all(p.grad is not None for p in neck.parameters())


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(in_channels=18), 'in_channels must be a multiple of 4, got 18'),
        (dict(in_channels=[16]), r'in_channels must be a multiple of 4, got \[16\]'),
        (dict(num_outs=3), 'num_outs must be at least 4, got 3'),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(**kwargs)
