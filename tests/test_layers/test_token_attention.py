import pytest
import torch

from mmdynsparse.layers import TokenMSA, received_attention


def test_equals_mmcv(randomize):
    bricks = pytest.importorskip('mmcv.cnn.bricks.transformer')
    theirs = randomize(bricks.MultiheadAttention(16, 4, batch_first=True)).eval()
    ours = TokenMSA(16, 4).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(ours(x), theirs(x) - x, atol=1e-6, rtol=0)


def test_policy_equals_leaving_tokens_out(randomize):
    attn = randomize(TokenMSA(16, 4)).eval()
    x = torch.randn(1, 7, 16)
    kept = [0, 2, 3, 6]
    policy = torch.zeros(1, 7)
    policy[0, kept] = 1
    torch.testing.assert_close(attn(x, policy)[:, kept], attn(x[:, kept]), atol=1e-6, rtol=0)


def test_tokens_that_are_not_there_are_not_attended(randomize):
    attn = randomize(TokenMSA(16, 4)).eval()
    x = torch.randn(2, 5, 16)
    valid = torch.tensor([[True, True, True, False, False], [True] * 5])
    out = attn(x, valid_BT=valid)
    torch.testing.assert_close(out[:1, :3], attn(x[:1, :3]), atol=1e-6, rtol=0)
    torch.testing.assert_close(out[1:], attn(x[1:]), atol=1e-6, rtol=0)


@pytest.mark.parametrize('queries', ['mean', 'cls'])
def test_what_tokens_receive(queries, randomize):
    """The same whether dropped tokens are there or not; what is attended is not touched by it."""
    attn = randomize(TokenMSA(16, 4), std=0.5).eval()
    x, kept = torch.randn(1, 7, 16), [0, 2, 3, 6]
    policy = torch.zeros(1, 7)
    policy[0, kept] = 1
    out, received = attn(x, policy, queries=queries)
    assert torch.equal(out, attn(x, policy))
    part, expected = attn(x[:, kept], queries=queries)
    assert torch.equal(part, attn(x[:, kept]))
    torch.testing.assert_close(received[:, kept], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(expected, received_attention(attn.attn, x[:, kept], queries))
    assert received[policy == 0].abs().max() == 0
