import pytest
import torch

from mmdynsparse.ops import put_rows, rows


def random_rows(count, total):
    return torch.randperm(total)[:count]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64, torch.int32])
@pytest.mark.parametrize('channels', [1, 3, 8, 12])
@pytest.mark.parametrize('count', [0, 1, 7, 10])
@torch.no_grad()
def test_put_rows_is_index_copy(dtype, channels, count):
    table = (100 * torch.randn(10, channels)).to(dtype)
    values, places = (100 * torch.randn(count, channels)).to(dtype), random_rows(count, 10)
    expected = table.clone().index_copy_(0, places, values)
    put_rows(table, places, values)
    assert torch.equal(table, expected)


@torch.no_grad()
def test_put_rows_keeps_every_bit():
    table = torch.zeros(3, 8)
    values = torch.tensor([[float('nan'), -0.0, float('inf'), 1e-45, 1.0, 2.0, 3.0, 4.0]])
    assert rows._in_words(table) and rows._in_words(values)
    put_rows(table, torch.tensor([1]), values)
    assert torch.equal(table[1].view(torch.int32), values[0].view(torch.int32))


@torch.no_grad()
def test_put_rows_takes_parts_of_tensors():
    base, values, places = torch.zeros(6, 9), torch.randn(2, 8), torch.tensor([3, 0])
    # Strided; contiguous but not at a multiple of 16 bytes; values that are strided.
    for table in (base[:, :8], base.flatten()[1:49].view(6, 8)):
        for rows_RC in (values, values.t().contiguous().t()):
            table.zero_()
            put_rows(table, places, rows_RC)
            assert torch.equal(table[places], values) and table.count_nonzero() == 16


def test_put_rows_has_gradients():
    table, values = torch.randn(4, 8, requires_grad=True), torch.randn(2, 8, requires_grad=True)
    out = table * 1
    put_rows(out, torch.tensor([2, 0]), values)
    out.sum().backward()
    assert table.grad[:, 0].tolist() == [0, 1, 0, 1] and values.grad.eq(1).all()


@torch.no_grad()
def test_put_rows_refuses_another_dtype():
    with pytest.raises(RuntimeError, match='same'):
        put_rows(torch.zeros(3, 4), torch.tensor([1]), torch.ones(1, 4, dtype=torch.int32))
