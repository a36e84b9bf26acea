from threading import Barrier, Thread
from time import sleep

import pytest
import torch
import torch.nn.functional as F

from mmdynsparse.ops import (
    caching,
    kept_window_rows,
    relative_position_index,
    shift_mask,
    window_layout,
    window_partition,
    window_unpartition,
    windows,
)

CPU = torch.device('cpu')
SHAPES = [((14, 14), 7, 0), ((14, 21), 7, 3), ((9, 16), 7, 3), ((1, 1), 7, 3), ((3, 30), 4, 2)]


def windows_by_copies(x_BHWC, size, shift):
    """Pad, roll and partition a map step by step, as the Swin paper describes it."""
    _, h, w, c = x_BHWC.shape
    x = F.pad(x_BHWC, (0, 0, 0, -w % size, 0, -h % size)).roll((-shift, -shift), (1, 2))
    x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3)
    return x.reshape(len(x), -1, size * size, c)


@pytest.mark.parametrize('hw, size, shift', SHAPES)
def test_layout_equals_pad_roll_partition(hw, size, shift):
    b, c = 2, 5
    x = torch.randn(b, *hw, c)
    layout = window_layout(b, hw, size, shift, CPU)
    padded = torch.cat((x.reshape(-1, c), torch.zeros(1, c)))
    windows = padded[layout.tokens]
    assert torch.equal(windows, windows_by_copies(x, size, shift))
    assert torch.equal(windows.reshape(-1, c)[layout.slots].view_as(x), x)


def test_worked_example_of_the_docstring():
    x = torch.arange(1.0, 10.0).view(1, 3, 3, 1)
    windows_AT = window_partition(x, window_size=2, shift=1)[0, :, 0, :, 0]
    assert windows_AT.tolist() == [[5, 6, 8, 9], [0, 4, 0, 7], [0, 0, 2, 3], [0, 0, 0, 1]]


@pytest.mark.parametrize('inference', [False, True])
@pytest.mark.parametrize('hw, size, shift', [*SHAPES, ((10, 9), 7, 3), ((5, 2), 4, 3)])
def test_partition_and_its_inverse(hw, size, shift, inference):
    """With gradients step by step, without in one copy; both are what the paper describes."""
    x, padding = torch.randn(2, *hw, 24), torch.randn(24)
    expected = windows_by_copies(x - padding, size, shift) + padding
    with torch.inference_mode(inference):
        parts = window_partition(x, size, shift, padding, (3, 2))
        maps = window_unpartition(parts[1], hw, size, shift)
        plain = window_partition(x, size, shift)
    expected = expected.flatten(0, 1).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(parts, expected)
    assert torch.equal(maps, x[..., 8:16])
    assert torch.equal(plain[0, :, 0], windows_by_copies(x, size, shift).flatten(0, 1))


def test_partition_has_gradients():
    x, padding = torch.randn(2, 5, 6, 4), torch.randn(4)
    leaves = [t.double().requires_grad_() for t in (x, padding)]

    def there_and_back(x, padding):
        windows = window_partition(x, 4, 2, padding, (1, 2))
        return windows, window_unpartition(windows[0], (5, 6), 4, 2)

    assert torch.autograd.gradcheck(there_and_back, leaves)


@pytest.mark.parametrize('hw, size, shift', SHAPES)
@pytest.mark.parametrize('share', [0.0, 0.1, 0.6, 1.0])
@pytest.mark.parametrize('break_even', [0, 9, 20])
def test_rows_of_kept_tokens(hw, size, shift, share, break_even, monkeypatch):
    """Of windows that hold a kept token they give what the rows of all windows give."""
    monkeypatch.setattr(windows, 'BREAK_EVEN_TENTHS', break_even)
    b, heads, d = 2, 3, 4
    n, t = b * hw[0] * hw[1], size * size
    kept = torch.randperm(n)[: int(share * n)]
    layout = window_layout(b, hw, size, shift, CPU)
    holds = torch.zeros(n + 1, dtype=torch.bool).index_fill_(0, kept, True)[layout.tokens]
    holds = holds.flatten(0, 1).any(1)
    table = torch.randn(n + 1, 3, heads, d)
    expected = table.permute(1, 0, 2, 3)[:, layout.tokens.flatten(0, 1)].transpose(2, 3)
    rows = kept_window_rows(kept, b, hw, size, shift, heads)
    some = rows.windows is not None
    if some:
        assert torch.equal(rows.windows, holds.nonzero().squeeze(1))
        expected = expected[:, holds]
    # The row behind the tokens is what the padding reads.
    listed = table[rows.tokens] if some else table[:-1]
    padded = torch.cat((listed, table[-1:]))
    parts = 3 if rows.queries is None else 2
    windows_of = padded[:, -parts:].reshape(-1, d)[rows.kv_rows].view(parts, -1, heads, t, d)
    assert torch.equal(windows_of, expected[-parts:])
    queries = windows_of[0]
    if rows.queries is not None:
        queries = listed[rows.queries, 0].reshape(-1, d)[rows.q_rows].view_as(expected[0])
    assert torch.equal(queries.reshape(-1, d)[rows.out_rows].view(-1, heads, d), table[kept, 0])
    assert some == (10 * holds.sum() <= break_even * len(holds))
    count = len(listed)
    assert (rows.queries is not None) == (0 < 10 * len(kept) <= break_even * count)


def test_tables_lie_on_the_device_and_are_static_where_values_cannot_be_read():
    kept = torch.tensor([3, 1], device='meta')
    rows = kept_window_rows(kept, 1, (5, 6), 4, 2, 2)
    assert rows.windows is None and rows.tokens is None
    assert all(t.is_meta for t in rows if isinstance(t, torch.Tensor))
    assert rows.kv_rows.shape == (2 * 4 * 2 * 16,) and rows.out_rows.shape == (4,)


def test_layout_made_under_inference_mode_serves_training():
    with torch.inference_mode():
        layout = window_layout(1, (5, 6), 4, 2, CPU)
        mask = shift_mask((2, 2), 4, 2, CPU)
    assert not any(t.is_inference() for t in (*layout, mask))


def test_layouts_are_kept_until_others_replace_them():
    first = shift_mask((1, 2), 4, 2, CPU)
    assert shift_mask((1, 2), 4, 2, CPU) is first
    for cols in range(20):
        shift_mask((2, cols + 1), 4, 2, CPU)
    again = shift_mask((1, 2), 4, 2, CPU)
    assert again is not first and torch.equal(again, first)


def test_captured_graphs_keep_what_they_read(monkeypatch):
    warm = shift_mask((1, 3), 4, 2, CPU)
    with monkeypatch.context() as patch:
        patch.setattr(caching, '_is_capturing', lambda device: True)
        assert shift_mask((1, 3), 4, 2, CPU) is warm
        cold = shift_mask((1, 4), 4, 2, CPU)
    # What was made in the capture has no values before the graph runs.
    assert shift_mask((1, 4), 4, 2, CPU) is not cold
    for cols in range(20):
        shift_mask((2, cols + 1), 4, 2, CPU)
    assert shift_mask((1, 3), 4, 2, CPU) is warm


def test_captured_graph_never_reads_what_others_have_replaced(monkeypatch):
    """Other shapes come between the call in a capture and the look at what is kept."""
    warm, waiting = shift_mask((1, 5), 4, 2, CPU), [True]

    def is_capturing(device):
        if waiting and waiting.pop():
            with monkeypatch.context() as patch:
                patch.setattr(caching, '_is_capturing', lambda device: False)
                for cols in range(20):
                    shift_mask((2, cols + 1), 4, 2, CPU)
            return True
        return False

    monkeypatch.setattr(caching, '_is_capturing', is_capturing)
    read = shift_mask((1, 5), 4, 2, CPU)
    assert read is not warm or shift_mask((1, 5), 4, 2, CPU) is warm


def test_threads_share_what_is_kept():
    """Four threads ask for more than is kept; what all ask for at once is made once."""
    made, wrong, together = [], [], Barrier(4)

    @caching.cached
    def square(number, device):
        made.append(number)
        sleep(0.01 if number == 40 else 0)
        return torch.full((1,), number * number, device=device)

    def ask(first):
        square(40, CPU)
        together.wait()
        for number in ((first + 7 * i) % 40 for i in range(1000)):
            if square(number, CPU).item() != number * number:
                wrong.append(number)

    threads = [Thread(target=ask, args=(i,)) for i in range(4)]
    for step in (Thread.start, Thread.join):
        for thread in threads:
            step(thread)
    assert not wrong and made.count(40) == 1


def test_traced_layouts_are_not_kept():
    class Shifted(torch.nn.Module):
        def forward(self, x):
            return x + shift_mask((3, 1), 4, 2, CPU)

    x = torch.zeros(3, 1, 1, 16, 16)
    exported = torch.export.export(Shifted(), (x,), strict=False)
    mask = shift_mask((3, 1), 4, 2, CPU)
    assert type(mask) is torch.Tensor
    assert torch.equal(exported.module()(x), mask)


def test_shift_mask_separates_what_the_roll_joined():
    mask = shift_mask((3, 3), 4, 2, CPU)
    assert mask.shape == (3, 3, 1, 16, 16)
    assert mask[:-1, :-1].abs().max() == 0
    corner = mask[-1, -1, 0] == 0
    quadrant = torch.tensor([(i // 4 // 2) * 2 + i % 4 // 2 for i in range(16)])
    assert torch.equal(corner, quadrant[:, None] == quadrant)


def test_relative_position_index_is_the_offset():
    index = relative_position_index(3)
    for i in range(9):
        for j in range(9):
            dy, dx = i // 3 - j // 3, i % 3 - j % 3
            assert index[i, j] == (dy + 2) * 5 + dx + 2
