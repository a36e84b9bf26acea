import pytest
import torch
import torch.nn.functional as F

from mmdynsparse.ops import (
    cell_grid,
    cell_mask,
    cell_means,
    cell_positions,
    cell_rows,
    cell_table,
    put_tiles,
    sparse_table,
    table_map,
    take_tiles,
    tile_rows,
)

MAPS = [(1, (16, 16)), (2, (13, 21)), (3, (3, 5))]


@pytest.mark.parametrize('batch, hw', MAPS)
@pytest.mark.parametrize('size', [1, 4, 8])
def test_means_and_masks_cover_the_map(batch, hw, size):
    rows, cols = cell_grid(hw, size)
    index = torch.arange(batch * rows * cols).float().view(batch, -1)
    spread = cell_mask(index, hw, size)
    assert spread.shape == (batch, 1, *hw)
    assert torch.equal(cell_means(spread, size)[..., 0], index)


@pytest.mark.parametrize('batch, hw', MAPS)
@pytest.mark.parametrize('size, halo', [(4, 1), (4, 3), (8, 2)])
@pytest.mark.parametrize('static', [False, True])
def test_convolution_of_tiles_is_that_of_the_map(batch, hw, size, halo, static, monkeypatch):
    """A 1 x 1 layer with a bias, then a padded convolution: at cells as on the whole map."""
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: static)
    x = torch.randn(batch, 3, *hw)
    pointwise, bias, weight = torch.randn(5, 3, 1, 1), torch.randn(5), torch.randn(4, 5, 3, 3)
    expected = F.conv2d(F.conv2d(x, pointwise, bias), weight, padding=halo, dilation=halo)

    cells = torch.arange(batch * cell_grid(hw, size)[0] * cell_grid(hw, size)[1])[::2]
    rows = cell_rows(cells, batch, hw, size, halo)
    table = cell_table(x)
    near = table.index_select(0, rows.near) @ pointwise.flatten(1).t() + bias
    if not static:
        assert torch.equal(rows.near, rows.near.unique())
    tiles = take_tiles(F.pad(near, (0, 0, 0, 1)), rows.tile_of_near, size + 2 * halo)
    out = tile_rows(F.conv2d(tiles, weight, dilation=halo))

    into = cell_table(torch.zeros(batch, 4, *hw)).index_copy(0, rows.inner, out)
    mask = torch.zeros(batch, cell_grid(hw, size)[0] * cell_grid(hw, size)[1])
    mask = cell_mask(mask.flatten().index_fill(0, cells, 1).view_as(mask), hw, size)
    result = table_map(into, batch, hw)
    torch.testing.assert_close(result, expected * mask, atol=1e-4, rtol=1e-4)
    # The tile rows themselves read the map, and zeros around it.
    direct = F.conv2d(take_tiles(table, rows.tile, size + 2 * halo), pointwise)
    inner = direct[:, :, halo:-halo, halo:-halo]
    again = cell_table(torch.zeros(batch, 5, *hw)).index_copy(0, rows.inner, tile_rows(inner))
    torch.testing.assert_close(table_map(again, batch, hw), F.conv2d(x, pointwise) * mask)


def test_no_cell_at_all():
    rows = cell_rows(torch.zeros(0, dtype=torch.int64), 1, (8, 8), 4, 1)
    assert [len(r) for r in rows] == [0, 0, 0, 0]


def test_a_map_goes_through_a_table_unchanged():
    x = torch.randn(2, 3, 5, 7)
    table = cell_table(x)
    assert table.shape == (2 * 5 * 7 + 2, 3) and table[-2:].abs().max() == 0
    assert torch.equal(table_map(table, 2, (5, 7)), x)


@pytest.mark.parametrize('hw', [(8, 12), (7, 10)])
def test_tiles_are_put_back(hw):
    """Tiles replace the cells they were taken from, whether or not cells divide the map."""
    torch.manual_seed(0)
    x, other = torch.randn(2, 3, *hw), torch.randn(2, 3, *hw)
    cells = torch.tensor([0, 4, 7, 11])
    rows = cell_rows(cells, 2, hw, 4, halo=0)
    tiles = take_tiles(cell_table(other), rows.tile, 4)
    mask = torch.zeros(12).index_fill_(0, cells, 1).view(2, 6)
    expected = torch.where(cell_mask(mask, hw, 4) > 0, other, x)
    actual = put_tiles(x.clone(), cells, tiles)
    assert actual.equal(expected)
    assert actual.is_contiguous()


def test_sparse_table():
    """Chosen rows and the zeros for padding are there."""
    table = sparse_table(torch.ones(2, 3), torch.tensor([4, 1]), 6)
    assert table.shape == (8, 3)
    assert table[[1, 4, 6]].tolist() == [[1] * 3, [1] * 3, [0] * 3]


def test_rows_are_static_where_values_cannot_be_read():
    cells = torch.tensor([0, 3], device='meta')
    rows = cell_rows(cells, 1, (5, 6), 4, 1)
    assert [len(r) for r in rows] == [2 * 16, 2 * 36, 2 * 36, 2 * 36]
    positions = cell_positions(cells, 1, (5, 6), 4)
    assert positions.shape == (2 * 16,)
    assert all(r.is_meta for r in (*rows, positions))
