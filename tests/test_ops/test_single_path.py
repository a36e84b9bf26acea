"""Gates, mixed kernels and costs of the operations that may replace an attention."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from mmdynsparse.ops import (
    BlockShape,
    bottleneck,
    chain,
    chosen_mixer,
    cost_gates,
    gated_cost,
    mix_heads,
    mixer_macs,
    mixer_weights,
    sample_gates,
    throttle,
)

STATES = list(product((0, 1), repeat=3))
SHAPE = BlockShape(locations=196, tokens=197, pairs=197**2, channels=64, heads=4)


def sampled(state, logits):
    """Gates in a given state, with the gradient of their relaxed sample."""
    uniform = torch.where(torch.tensor(state) == 1, 0.99, 0.001)
    return sample_gates(logits, uniform)


@pytest.mark.parametrize('state', STATES)
def test_weights_are_one_hot_or_zero(state):
    weights = mixer_weights(chain(torch.tensor(state, dtype=torch.float32)))
    count = 0
    for gate in state:  # gates that are open from the first on
        if not gate:
            break
        count += 1
    assert weights.tolist() == [float(i + 1 == count) for i in range(3)]
    logits = torch.tensor(state) * 2.0 - 1
    assert chosen_mixer(logits) == ('none', 'conv1', 'conv3', 'msa')[count]


@pytest.mark.parametrize('state', STATES)
def test_gradients_are_throttled(state):
    """For operations with the values 2, 3 and 5, against the derivatives written out."""
    logits = torch.tensor([0.3, 0.2, 0.1], requires_grad=True)
    gates = sampled(state, logits)
    assert gates.tolist() == [float(s) for s in state]
    out = mixer_weights(throttle(chain(gates))) @ torch.tensor([2.0, 3.0, 5.0])
    (grad,) = torch.autograd.grad(out, logits, retain_graph=True)
    slopes = [torch.autograd.grad(g, logits, retain_graph=True)[0][i] for i, g in enumerate(gates)]
    b1, b2, b3 = state
    g1, g2, g3 = b1, b1 * b2, b1 * b2 * b3
    # Of 2 g1 (1 - g2) (1 - g3) + 3 g2 (1 - g3) + 5 g3, by the chained gates; some are cut.
    by1 = 0 if g2 else 2 * (1 - g2) * (1 - g3)
    by2 = 0 if g3 else (3 - 2 * g1) * (1 - g3)
    by3 = 5 - 3 * g2 - 2 * g1 * (1 - g2)
    expected = [
        by1 + by2 * b2 + by3 * b2 * b3,
        by2 * b1 + by3 * b1 * b3,
        by3 * b1 * b2,
    ]
    for got, value, slope in zip(grad, expected, slopes, strict=True):
        torch.testing.assert_close(got, torch.as_tensor(value * slope))


def test_samples_are_exact_and_follow_the_probability():
    logits = torch.full((20000,), 1.5)
    gates = sample_gates(logits, torch.rand(20000))
    assert set(gates.tolist()) == {0.0, 1.0}
    assert gates.mean().item() == pytest.approx(torch.tensor(1.5).sigmoid().item(), abs=0.01)


def attention_weights():
    torch.manual_seed(0)
    return torch.randn(8, 8), torch.randn(8), torch.randn(8, 8)


@pytest.mark.parametrize('alpha', [0.01, 100.0])
def test_kernels_are_sums_of_shifted_heads(alpha):
    """Against an explicit loop over positions and heads."""
    value, bias, output = attention_weights()
    logits = torch.randn(2, 9) * alpha
    share = (logits / alpha).softmax(0)
    kernels = mix_heads(value, bias, output, logits, alpha)
    x = torch.randn(2, 8, 5, 6)
    padded = F.pad(x, (1, 1, 1, 1))
    total, expand, centre = 0, 0, 0
    for k in range(9):
        row, col = divmod(k, 3)
        shifted = padded[:, :, row : row + 5, col : col + 6]
        for h in range(2):
            rows = slice(4 * h, 4 * h + 4)
            y = torch.einsum('dc,bchw->bdhw', value[rows], shifted) + bias[rows, None, None]
            total = total + share[h, k] * y
            expand = expand + share[h, k] * output[:, rows]
            if k == 4:
                centre = centre + share[h, k] * y
    weights = bottleneck(kernels, 3)
    torch.testing.assert_close(F.conv2d(x, weights.reduce, weights.bias, padding=1), total)
    torch.testing.assert_close(weights.expand, expand)
    weights = bottleneck(kernels, 1)
    torch.testing.assert_close(F.conv2d(x, weights.reduce, weights.bias), centre)


def test_one_hot_shares_are_single_heads():
    value, _, output = attention_weights()
    logits = F.one_hot(torch.arange(9) % 2, 2).t() * 1000.0
    kernels = mix_heads(value, None, output, logits, 0.01)
    assert kernels.bias is None and bottleneck(kernels, 3).bias is None
    for k in range(9):
        rows = slice(4 * (k % 2), 4 * (k % 2) + 4)
        torch.testing.assert_close(kernels.reduce[k], value[rows])
        torch.testing.assert_close(kernels.expand[k], output[:, rows])


@pytest.mark.parametrize('state', STATES)
def test_gated_cost_is_that_of_the_chosen_mixer(state):
    logits = (torch.tensor(state) * 2.0 - 1).requires_grad_()
    costs = mixer_macs(SHAPE)
    cost = gated_cost(cost_gates(logits), costs)
    assert cost.item() == pytest.approx(costs[chosen_mixer(logits)], rel=1e-6)
    (grad,) = torch.autograd.grad(cost, logits)
    for i in range(3):  # the others get none
        assert (grad[i] > 0) == all(state[:i])


def test_costs_of_a_convolution_are_independent_of_the_class_token():
    costs = mixer_macs(SHAPE)
    assert costs['none'] == 0
    assert costs['conv1'] == 2 * 196 * 64 * 16
    assert costs['conv3'] == 10 * 196 * 64 * 16
    assert costs['msa'] == 4 * 197 * 64**2 + 2 * 64 * 197**2
