"""Tests of 3 x 3 convolutions in Winograd's form."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from mmdynsparse.ops import conv2d, winograd


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def _inputs(batch=1, channels=96, hw=(40, 41), outs=100):
    torch.manual_seed(0)
    x = torch.randn(batch, channels, *hw).relu_()
    return x, torch.randn(outs, channels, 3, 3) / (9 * channels) ** 0.5, torch.randn(outs)


def _transformed(monkeypatch):
    """Count the convolutions that take Winograd's form."""
    calls, form = [], winograd._winograd
    monkeypatch.setattr(winograd, '_winograd', lambda *args: calls.append(1) or form(*args))
    return calls


@pytest.mark.parametrize(
    'batch, hw, padding',
    [
        *(
            (*shape, p)
            for shape in [(1, (40, 40)), (1, (31, 52)), (2, (47, 26))]
            for p in (0, 1, 2)
        ),
        (40, (10, 10), 0),
    ],
)
@pytest.mark.parametrize('chunk', [2**22, 2**14])
def test_it_equals_the_direct_form(batch, hw, padding, chunk, monkeypatch):
    x, weight, bias = _inputs(batch, hw=hw)
    calls = _transformed(monkeypatch)
    monkeypatch.setattr(winograd, '_CHUNK', chunk)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=padding)
    for memory in (torch.contiguous_format, torch.channels_last):
        out = conv2d(x.contiguous(memory_format=memory), weight, bias, padding=padding)
        assert out.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(out, expected.float(), rtol=0, atol=2e-5)
    assert len(calls) == 2


def test_the_error_is_that_of_float32():
    x, weight, _ = _inputs(channels=512, hw=(64, 64), outs=128)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    error = (conv2d(x, weight, padding=1) - exact).std() / exact.std()
    assert error < 2e-6


def test_inputs_stay_as_they_are():
    x, weight, bias = _inputs()
    before = [value.clone() for value in (x, weight, bias)]
    conv2d(x, weight, bias, padding=1)
    for value, old in zip((x, weight, bias), before, strict=True):
        assert torch.equal(value, old)


@pytest.mark.parametrize(
    'case',
    [
        dict(stride=2),
        dict(dilation=2, padding=2),
        dict(padding=(0, 1)),
        dict(padding='same'),
        dict(outs=95),
        dict(channels=64),
        dict(hw=(28, 28)),
        dict(hw=(2, 400), padding=1),
        dict(hw=(14, 14), batch=10, padding=1),
        dict(dtype=torch.float64),
    ],
)
def test_what_gains_nothing_is_direct(case, monkeypatch):
    calls = _transformed(monkeypatch)
    shape = {name: case.pop(name) for name in ('batch', 'outs', 'channels', 'hw') if name in case}
    dtype = case.pop('dtype', torch.float32)
    x, weight, bias = (value.to(dtype) for value in _inputs(**shape))
    assert torch.equal(conv2d(x, weight, bias, **case), F.conv2d(x, weight, bias, **case))
    assert not calls


def test_groups_are_direct(monkeypatch):
    calls = _transformed(monkeypatch)
    x, weight, _ = _inputs(channels=192, outs=192)
    weight = weight[:, :96]
    assert torch.equal(conv2d(x, weight, groups=2), F.conv2d(x, weight, groups=2))
    assert not calls


def test_training_and_autocast_are_direct(monkeypatch):
    calls = _transformed(monkeypatch)
    x, weight, bias = _inputs()
    with torch.autocast('cpu', torch.bfloat16):
        assert conv2d(x, weight, bias).dtype == torch.bfloat16
    with torch.enable_grad():
        weight.requires_grad_()
        conv2d(x, weight, bias).sum().backward()
    assert weight.grad is not None
    assert not calls


def test_multiply_adds_are_those_of_the_direct_form():
    x, weight, bias = _inputs()
    with FlopCounterMode(display=False) as counter:
        conv2d(x, weight, bias)
    assert counter.get_total_flops() == 2 * 9 * 96 * 100 * 38 * 39


class Conv(torch.nn.Conv2d):
    """A convolution as the models have it."""

    def forward(self, x):
        return conv2d(x, self.weight, self.bias, padding=1)


def _exported(device):
    conv, x = Conv(256, 256, 3).eval().to(device), _inputs(channels=256)[0].to(device)
    program = torch.export.export(conv, (x,))
    return conv, x, program, ' '.join(str(node.target) for node in program.graph.nodes)


def test_an_exported_convolution_is_matrix_products():
    conv, x, program, operators = _exported('cpu')
    assert 'matmul' in operators
    assert 'conv' not in operators and 'scatter' not in operators
    torch.testing.assert_close(program.module()(x), F.conv2d(x, conv.weight, conv.bias, padding=1))


def test_exported_for_another_device_it_is_direct():
    assert 'conv2d' in _exported('meta')[-1]


@pytest.mark.parametrize('hw', [(2, 2), (1, 40)])
def test_maps_smaller_than_a_kernel_fail_as_before(hw):
    x, weight, _ = _inputs(batch=64, hw=hw)
    with pytest.raises(RuntimeError, match='Kernel size'):
        conv2d(x, weight)
