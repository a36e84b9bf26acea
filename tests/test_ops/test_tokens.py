import pytest
import torch

from mmdynsparse.ops import (
    attention_received,
    policy_softmax,
    put_tokens,
    take_tokens,
    token_subset,
)


@pytest.mark.parametrize('counts, count', [((3, 3), 3), ((0, 4), None), ((5, 2), None)])
def test_take_and_put_are_inverse(counts, count):
    x = torch.randn(2, 6, 4)
    mask = torch.zeros(2, 6)
    for row, n in zip(mask, counts, strict=True):
        row[torch.randperm(6)[:n]] = 1
    subset = token_subset(mask, count)
    tokens = take_tokens(x, subset)
    for b, n in enumerate(counts):
        assert torch.equal(tokens[b, :n], x[b, mask[b].bool()])
        assert tokens[b, n:].abs().sum() == 0
    out = put_tokens(x, tokens + 1, subset)
    assert torch.equal(out, x + mask[..., None])


def test_subset_of_equal_counts_needs_no_validity():
    mask = torch.tensor([[1.0, 0, 1], [0, 1, 1]])
    assert token_subset(mask, 2).valid is None
    assert token_subset(mask, 2).positions.tolist() == [[0, 2], [1, 2]]


def test_policy_softmax_is_the_softmax_over_kept_tokens_and_oneself():
    logits = torch.randn(1, 2, 4, 4)
    policy = torch.tensor([[1.0, 0, 1, 0]])
    weights = policy_softmax(logits, policy, eps=0.0)
    for i in range(4):
        allowed = sorted({0, 2, i})
        expected = torch.zeros(2, 4)
        expected[:, allowed] = logits[0, :, i, allowed].softmax(-1)
        torch.testing.assert_close(weights[0, :, i], expected)


def test_policy_softmax_is_float32_and_has_a_gradient():
    policy = torch.tensor([[1.0, 0, 1, 0]], requires_grad=True)
    weights = policy_softmax(torch.randn(1, 2, 4, 4).bfloat16(), policy, eps=1e-6)
    assert weights.dtype == torch.float32
    weights[..., 1].sum().backward()
    assert policy.grad[0, 1] != 0


def explicit(q, k, scale, rows):
    """Mean over heads and chosen queries of all softmax weights at once."""
    return ((q * scale) @ k.transpose(-2, -1)).softmax(-1)[:, :, rows].mean((1, 2))


@pytest.mark.parametrize('queries, rows', [('mean', slice(None)), ('cls', slice(1))])
def test_attention_received_is_the_mean_of_the_weights(queries, rows):
    q, k = torch.randn(2, 2, 3, 7, 4, requires_grad=True).unbind()
    received = attention_received(q, k, 0.5, queries)
    expected = explicit(q, k, 0.5, rows)
    torch.testing.assert_close(received, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(received.sum(1), torch.ones(2))
    weight = torch.randn(2, 7)
    for a, b in zip(
        torch.autograd.grad((received * weight).sum(), (q, k)),
        torch.autograd.grad((expected * weight).sum(), (q, k)),
        strict=True,
    ):
        assert a.isfinite().all() and a.abs().max() > 0
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize('queries, rows', [('mean', slice(None)), ('cls', slice(1))])
def test_attention_received_from_tokens_that_are_there(queries, rows):
    q, k = torch.randn(2, 2, 3, 7, 4, requires_grad=True).unbind()
    valid = torch.tensor([[True] * 7, [True, False, True, True, False, True, False]])
    received = attention_received(q, k, 0.5, queries, valid)
    for i in range(2):
        present = [x[i : i + 1, :, valid[i]] for x in (q, k)]
        expected = explicit(*present, 0.5, rows)[0]
        torch.testing.assert_close(received[i, valid[i]], expected, atol=1e-6, rtol=0)
    assert received[1, ~valid[1]].abs().max() == 0
    grads = torch.autograd.grad(received.square().sum(), (q, k))
    assert all(grad.isfinite().all() for grad in grads)


def test_attention_received_is_float32_and_of_nobody_is_zero():
    q = torch.randn(1, 2, 5, 4, dtype=torch.bfloat16)
    nobody = torch.zeros(1, 5, dtype=torch.bool)
    received = attention_received(q, q, 0.5, valid_BT=nobody)
    assert received.dtype == torch.float32 and received.abs().max() == 0
