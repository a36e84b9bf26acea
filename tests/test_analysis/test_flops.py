import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmdynsparse.analysis import count_macs


@pytest.mark.parametrize(
    ('module', 'shape', 'expected'),
    [
        (nn.Linear(5, 7), (3, 5), 3 * 5 * 7),
        (nn.Conv2d(8, 16, 3, padding=1), (2, 8, 10, 12), 2 * 10 * 12 * 16 * 8 * 9),
        (nn.Conv2d(8, 16, 3, padding=1, groups=4), (1, 8, 10, 10), 10 * 10 * 16 * 2 * 9),
        (nn.LayerNorm(5), (3, 5), 0),
    ],
)
def test_modules(module, shape, expected):
    assert count_macs(module, torch.randn(shape)) == expected


def test_attention_is_counted():
    query, key = torch.randn(1, 2, 10, 8), torch.randn(1, 2, 6, 8)
    products = 2 * (2 * 10 * 6 * 8)
    assert count_macs(F.scaled_dot_product_attention, query, key, key) == products
    x = torch.randn(1, 9, 16)
    attention = nn.MultiheadAttention(16, 4, batch_first=True)
    assert count_macs(attention, x, x, x) == 4 * 9 * 16 * 16 + 2 * 9 * 9 * 16


class HalfInEval(nn.Module):
    """Computes all rows in training and the first half of them in eval."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.frozen = nn.Dropout().eval()

    def forward(self, x):
        return self.linear(x if self.training else x[: len(x) // 2])


def test_only_what_is_executed_counts_and_modes_come_back():
    module = HalfInEval()
    assert count_macs(module, torch.randn(10, 4)) == 5 * 4 * 4
    assert module.training
    assert not module.frozen.training


def test_modes_come_back_after_an_error():
    module = HalfInEval()
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(RuntimeError):
        count_macs(module, torch.randn(10, 3))
    assert module.training
    assert torch.backends.mha.get_fastpath_enabled() == fastpath
