import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from mmdynsparse.ops import linear


@pytest.mark.parametrize('shape', [(7, 12), (2, 5, 12), (0, 12), (1, 12)])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('gelu', [True, False])
@pytest.mark.parametrize('grad', [True, False])
def test_equals_torch(shape, bias, gelu, grad):
    x, weight = torch.randn(shape), torch.randn(8, 12)
    bias = torch.randn(8) if bias else None
    expected = F.linear(x, weight, bias)
    expected = F.gelu(expected) if gelu else expected
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(linear(x, weight, bias, gelu), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_takes_parts_of_tensors():
    x, weight = torch.randn(2, 9, 20), torch.randn(8, 20)
    out = linear(x[..., 4:16], weight[:, 4:16], None)
    torch.testing.assert_close(out, x[..., 4:16] @ weight[:, 4:16].t())
    out = linear(x.transpose(0, 1), weight, None)
    torch.testing.assert_close(out, x.transpose(0, 1) @ weight.t())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_keeps_the_dtype(dtype):
    x, weight = torch.randn(7, 12, dtype=dtype), torch.randn(8, 12, dtype=dtype)
    assert torch.equal(linear(x, weight, None), F.linear(x, weight))


@torch.no_grad()
def test_follows_autocast():
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert linear(torch.randn(7, 12), torch.randn(8, 12), None).dtype == torch.bfloat16


@torch.no_grad()
def test_multiply_adds_are_counted():
    with FlopCounterMode(display=False) as counter:
        linear(torch.randn(2, 7, 12), torch.randn(8, 12), torch.randn(8))
    assert counter.get_total_flops() == 2 * 14 * 12 * 8


def test_gradients_are_those_of_torch():
    x = torch.randn(7, 12, requires_grad=True)
    weight, bias = torch.randn(8, 12, requires_grad=True), torch.randn(8, requires_grad=True)
    grads = [
        torch.autograd.grad(out.square().sum(), (x, weight, bias))
        for out in (linear(x, weight, bias, gelu=True), F.gelu(F.linear(x, weight, bias)))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
