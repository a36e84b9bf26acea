import pytest
import torch
import torch.nn.functional as F

from mmdynsparse.layers import (
    AttentionScore,
    CellPredictor,
    LinearFastPath,
    LocalGlobalPredictor,
    MagnitudeScore,
)


def published(p, x):
    """Compute the published formula on the concatenation of local half and mean."""
    x = F.gelu(p.fc_in(p.norm(x)))
    half = x.shape[-1] // 2
    mean = x[..., half:].mean(1, keepdim=True).expand(-1, x.shape[1], -1)
    x = torch.cat((x[..., :half], mean), -1)
    return p.fc3(F.gelu(p.fc2(F.gelu(p.fc1(x))))).log_softmax(-1)


@pytest.mark.parametrize('dims', [4, 7, 24])
def test_predictor_follows_the_formula(dims):
    predictor = LocalGlobalPredictor(dims)
    x = torch.randn(2, 15, dims)
    out = predictor(x)
    torch.testing.assert_close(out, published(predictor, x), atol=1e-6, rtol=0)
    torch.testing.assert_close(out.exp().sum(-1), torch.ones(2, 15))


def test_log_softmax_is_float32_under_autocast():
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert LocalGlobalPredictor(8)(torch.randn(1, 4, 8)).dtype == torch.float32


def test_too_few_channels():
    with pytest.raises(ValueError, match='embed_dims must be at least 4, got 3'):
        LocalGlobalPredictor(3)


def test_fast_path():
    path = LinearFastPath(6)
    x = torch.randn(5, 6)
    torch.testing.assert_close(path(x), path.fc(F.layer_norm(x, (6,))))


def test_cell_predictor_works_at_a_reduced_width():
    predictor = CellPredictor(64)
    assert predictor.score.fc_in.in_features == 16
    log_probs = predictor(torch.randn(2, 9, 64))
    assert log_probs.shape == (2, 9, 2) and log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, 9))


@pytest.mark.parametrize('embed_dims, reduction', [(12, 4), (16, 0)])
def test_cell_predictor_refuses_too_few_channels(embed_dims, reduction):
    with pytest.raises(ValueError, match=f'reduction must be in .* got {reduction}'):
        CellPredictor(embed_dims, reduction)


@pytest.mark.parametrize('predictor', [AttentionScore(8), MagnitudeScore(8)])
def test_scores_are_shares_of_what_is_there(predictor):
    x = torch.rand(2, 5) if isinstance(predictor, AttentionScore) else torch.randn(2, 5, 8)
    among = torch.tensor([[1.0, 1, 0, 1, 0], [0, 0, 0, 0, 1]])
    assert not list(predictor.parameters()) and not predictor.learns
    log_probs = predictor(x.requires_grad_())
    assert log_probs.shape == (2, 5, 2) and log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, 5))
    torch.testing.assert_close(log_probs[..., 0].exp().sum(1), torch.ones(2))
    part = predictor(x, among)
    assert torch.equal(part[..., 0] == -torch.inf, among == 0)
    torch.testing.assert_close(part[..., 0].exp().sum(1), torch.ones(2))
    part[..., 0].masked_fill(among == 0, 0.0).sum().backward()
    assert x.grad.isfinite().all()
    assert predictor(0 * x, 0 * among).isneginf().all()


def test_attention_scores_are_in_the_order_of_the_attention():
    received = torch.rand(1, 9)
    assert torch.equal(AttentionScore(4)(received)[..., 0].argsort(), received.argsort())
    with pytest.raises(ValueError, match="queries must be 'mean' or 'cls', got 'all'"):
        AttentionScore(4, queries='all')


@pytest.mark.parametrize('size', [1, 4])
def test_magnitude_is_the_root_mean_square_over_the_cell(size):
    """Cells at the edge have fewer locations, and lose nothing by that."""
    x = torch.randn(2, 6, 7, 10)
    seen = MagnitudeScore.pool(x, size)
    means = x.abs().mean(1)
    expected = [
        means[:, y : y + size, x : x + size].square().mean((1, 2)).sqrt()
        for y in range(0, 7, size)
        for x in range(0, 10, size)
    ]
    torch.testing.assert_close(seen, torch.stack(expected, 1).unsqueeze(-1))
    log_probs = MagnitudeScore(6)(seen)
    assert torch.equal(log_probs[..., 0].argsort(1), seen[..., 0].argsort(1))
