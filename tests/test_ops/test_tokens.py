import pytest
import torch

from mmdynsparse.ops import policy_softmax, put_tokens, take_tokens, token_subset


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
