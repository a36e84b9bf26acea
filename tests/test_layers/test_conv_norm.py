import pytest
import torch
from mmengine.model import revert_sync_batchnorm
from torch import nn

from mmdynsparse.layers import can_fold, conv_norm


@pytest.mark.parametrize('stride, padding, dilation', [(1, 1, 1), (2, 1, 1), (1, 2, 2)])
@pytest.mark.parametrize('side', [4, 40])
@pytest.mark.parametrize('training', [False, True])
def test_equals_convolution_then_norm(stride, padding, dilation, side, training):
    """Folded where the map is larger than the weights, not folded where it is smaller."""
    conv = nn.Conv2d(12, 16, 3, stride, padding, dilation, bias=False)
    norm = nn.BatchNorm2d(16).train(training)
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    x = torch.randn(2, 12, side, side)
    torch.testing.assert_close(conv_norm(x, conv, norm), norm(conv(x)), atol=1e-5, rtol=1e-5)


def test_what_can_be_folded():
    conv, sync = nn.Conv2d(3, 8, 3, bias=False), nn.SyncBatchNorm(8)
    for norm in (nn.BatchNorm2d(8), sync, revert_sync_batchnorm(sync)):
        assert can_fold(conv, norm)
        assert not can_fold(nn.Conv2d(3, 8, 3), norm)
    for norm in (
        nn.GroupNorm(2, 8),
        nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
        nn.BatchNorm2d(8, affine=False),
        nn.BatchNorm2d(8, track_running_stats=False),
    ):
        assert not can_fold(conv, norm)
        x = torch.randn(2, 3, 40, 40)
        torch.testing.assert_close(conv_norm(x, conv, norm), norm(conv(x)))


@pytest.mark.parametrize('side', [5, 40])
def test_gradients_reach_all_parameters(side):
    conv, norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8).eval()
    x = torch.randn(1, 3, side, side)
    grads = []
    for out in (conv_norm(x, conv, norm), norm(conv(x))):
        grads.append(torch.autograd.grad(out.square().sum(), [conv.weight, *norm.parameters()]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize('dilation', [1, 2])
@pytest.mark.parametrize('side', [6, 40])
def test_halo_stands_for_the_padding(dilation, side):
    conv = nn.Conv2d(3, 8, 3, padding=dilation, dilation=dilation, bias=False)
    norm, x = nn.BatchNorm2d(8).eval(), torch.randn(1, 3, side, side)
    inner = conv_norm(x, conv, norm)[:, :, dilation:-dilation, dilation:-dilation]
    torch.testing.assert_close(conv_norm(x, conv, norm, halo=dilation), inner)
