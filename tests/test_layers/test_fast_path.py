import pytest
import torch

from mmdynsparse.layers import LowRankFastPath


def test_low_rank_path_starts_as_nothing_and_learns():
    path = LowRankFastPath(32)
    x = torch.randn(2, 5, 32)
    out = path(x)
    assert out.shape == x.shape and out.abs().max() == 0
    out.sum().backward()
    assert path.fc2.bias.grad.abs().min() > 0


def test_low_rank_path_can_be_put_back_to_its_start(randomize):
    """As after a backbone has initialized all linear layers."""
    path = randomize(LowRankFastPath(32))
    assert path(torch.ones(1, 32)).abs().max() > 0
    path.init_weights()
    assert path(torch.ones(1, 32)).abs().max() == 0 and path.fc1.weight.abs().max() > 0


@pytest.mark.parametrize('reduction', [0, 33])
def test_low_rank_path_refuses_a_width_of_zero(reduction):
    with pytest.raises(ValueError, match=f'reduction must be in 1 to 32, got {reduction}'):
        LowRankFastPath(32, reduction)
