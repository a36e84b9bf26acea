"""Bilinear enlargement at chosen rows against that of the whole map."""

import pytest
import torch
import torch.nn.functional as F

from mmdynsparse.ops import enlarge_rows

SIZES = {'twice': ((4, 6), (8, 12)), 'odd': ((3, 4), (5, 7)), 'one': ((1, 1), (3, 2))}


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize(('small', 'hw'), SIZES.values(), ids=SIZES)
def test_equals_interpolate(small, hw, align_corners):
    """Chosen rows are those of the enlarged map, in any order and memory format."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, *small)
    whole = F.interpolate(x, hw, mode='bilinear', align_corners=align_corners)
    rows = torch.randperm(2 * hw[0] * hw[1])[:7]
    expected = whole.permute(0, 2, 3, 1).flatten(0, 2)[rows]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        actual = enlarge_rows(x.contiguous(memory_format=memory_format), rows, hw, align_corners)
        torch.testing.assert_close(actual, expected)


def test_rows_beyond_the_end():
    """Rows beyond the end, which tables keep for what lies outside of the map, are harmless."""
    x = torch.randn(1, 3, 2, 2)
    last, beyond = enlarge_rows(x, torch.tensor([15, 17]), (4, 4))
    assert last.equal(beyond)


def test_gradient():
    """The gradient is that of the whole map's interpolation."""
    x = torch.randn(1, 3, 2, 3, dtype=torch.double, requires_grad=True)
    rows = torch.tensor([0, 7, 23])
    torch.autograd.gradcheck(lambda x: enlarge_rows(x, rows, (4, 6)), x, atol=1e-4)
