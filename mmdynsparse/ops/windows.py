"""Attention windows of a map, whole or in part.

Dense attention cuts the map into windows and puts them back: ``window_partition`` and
``window_unpartition``. Sparse attention reads some windows only, through index tables:
``kept_window_rows``. So does exported code all of them: there a table is one operator.

Source: Liu et al., *Swin Transformer* (arXiv 2103.14030), sections 3.2-3.3. Dimension letters: B
images, H x W tokens of a map, N = H * W, C channels; L windows of one image, T = window_size ** 2
tokens of a window, h heads, D = C / h; of a decision, K kept tokens, A windows that hold one and R
tokens in these. Where all windows attend, A = B * L.
"""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from .caching import cached
from .cells import cell_grid
from .rows import plain_inference, shapes_may_vary

# Tenths of the windows that attend, or of the tokens with a query, above which all of them do: no
# more than one tenth would be saved. Whole numbers, which an exporter can compare where the batch
# is a symbol.
BREAK_EVEN_TENTHS = 9


def window_partition(
    x_BHWC: Tensor,
    window_size: int,
    shift: int = 0,
    padding: Tensor | None = None,
    split: tuple[int, int] = (1, 1),
) -> Tensor:
    """Cut maps into windows as Swin does: pad right and bottom, roll by ``-shift``, cut.

    A 3 x 3 map in windows of 2 x 2 with shift 1, where ``.`` is padding::

        map      padded     rolled       windows
        1 2 3    1 2 3 .    5 6 | . 4    5 6   . 4   . .   . .
        4 5 6    4 5 6 .    8 9 | . 7    8 9   . 7   2 3   . 1
        7 8 9    7 8 9 .    ----+----
                 . . . .    . . | . .
                            2 3 | . 1

    Args:
        x_BHWC: The maps.
        window_size: Side of a window, in tokens.
        shift: Cyclic shift in tokens, 0 <= shift < window_size. Defaults to 0.
        padding: (C,), what the padding holds. Defaults to None, zero.
        split: Number P of parts (queries, keys, values) and h of heads that make up the channels,
            C = P * h * D. Defaults to (1, 1).

    Returns:
        (P, B * L, h, T, D): the windows of an image row by row, and so their tokens.
    """
    if padding is None:
        padding = x_BHWC.new_zeros(x_BHWC.shape[3])
    if plain_inference(x_BHWC):
        return _partition_at_once(x_BHWC, window_size, shift, padding, split)
    x, padding = x_BHWC, padding.to(x_BHWC.dtype)
    for dim in (1, 2):
        tokens, gap, moved, rest = _lengths(x.shape[dim], window_size, shift)
        start, end = x.split((moved, tokens), dim)
        shapes = ((*x.shape[:dim], n, *x.shape[dim + 1 :]) for n in (gap, rest))
        gap, rest = (padding.expand(shape) for shape in shapes)
        parts = [part for part in (end, gap, start, rest) if part.shape[dim]]
        x = torch.cat(parts, dim) if len(parts) > 1 else x
    x = x.unflatten(2, (-1, window_size)).unflatten(1, (-1, window_size))
    x = x.transpose(2, 3).reshape(-1, window_size**2, *split, x.shape[-1] // (split[0] * split[1]))
    return x.permute(2, 0, 3, 1, 4)


def window_unpartition(
    windows_AhTD: Tensor, hw: tuple[int, int], window_size: int, shift: int = 0
) -> Tensor:
    """Put the windows of maps together, the inverse of :func:`window_partition` for one part.

    Args:
        windows_AhTD: All windows of the maps, A = B * L.
        hw: Height and width of the maps.
        window_size: Side of a window, in tokens.
        shift: Cyclic shift in tokens. Defaults to 0.

    Returns:
        (B, H, W, C), without the padding.
    """
    x = windows_AhTD.transpose(1, 2).unflatten(1, (window_size, window_size))
    x = x.unflatten(0, (-1, *cell_grid(hw, window_size))).transpose(2, 3)
    if plain_inference(x):
        maps = x.new_empty(len(x), *hw, *x.shape[-2:])
        for in_map, in_grid in _blocks(hw, window_size, shift):
            block = x[in_grid]
            maps[in_map].view(block.shape).copy_(block)
        return maps.flatten(3)
    x = x.flatten(5).flatten(3, 4).flatten(1, 2)
    for dim, size in enumerate(hw, 1):
        end, _, start, _ = x.split(_lengths(size, window_size, shift), dim)
        x = torch.cat((start, end), dim) if shift else end
    return x


def _partition_at_once(
    x_BHWC: Tensor, window_size: int, shift: int, padding: Tensor, split: tuple[int, int]
) -> Tensor:
    """Do what ``window_partition`` does in one copy of the map instead of five."""
    x = x_BHWC.unflatten(3, (*split, -1))
    b, h, w, parts, heads, dims = x.shape
    grid = (b, *cell_grid((h, w), window_size))
    windows = x.new_empty(parts, *grid, heads, window_size, window_size, dims)
    # As the map is: (B, rows, side, columns, side, parts, h, D).
    slots = windows.permute(1, 2, 5, 3, 6, 0, 4, 7)
    if h % window_size or w % window_size:
        slots[:, (h - shift) // window_size :] = padding.view(x.shape[3:])
        slots[:, :, :, (w - shift) // window_size :] = padding.view(x.shape[3:])
    for in_map, in_grid in _blocks((h, w), window_size, shift):
        block = slots[in_grid]
        block.copy_(x[in_map].view(block.shape))
    return windows.flatten(5, 6).flatten(1, 3)


def _lengths(size: int, window_size: int, shift: int) -> tuple[int, int, int, int]:
    """Lengths along a shifted axis: tokens, padding, tokens moved to the end, padding."""
    moved = min(shift, size)
    return size - moved, size + -size % window_size - max(size, shift), moved, shift - moved


def _blocks(hw: tuple[int, int], window_size: int, shift: int) -> Iterator[tuple]:
    """Yield where each block lies: in maps (B, H, W), in windows (B, rows, side, columns, side)."""
    for y, x in product(*(_pieces(size, window_size, shift) for size in hw)):
        yield (slice(None), y[0], x[0]), (slice(None), *y[1:], *x[1:])


def _pieces(size: int, window_size: int, shift: int) -> list[tuple[slice, slice, slice]]:
    """Cut an axis of a map into what fills windows, the rest, and what the shift moves to the end.

    Returns:
        For each piece its positions, its windows, and the offsets that it has in them.
    """
    start = min(shift, size)
    whole, rest = divmod(size - start, window_size)
    last, offset = (size - 1) // window_size, window_size - shift
    end = start + whole * window_size
    pieces = [
        (slice(start, end), slice(0, whole), slice(0, window_size)),
        (slice(end, size), slice(whole, whole + 1), slice(0, rest)),
        (slice(0, start), slice(last, last + 1), slice(offset, offset + start)),
    ]
    return [piece for piece in pieces if piece[0].start < piece[0].stop]


class WindowLayout(NamedTuple):
    """The permutation between a batch of maps and its windows.

    Attributes:
        tokens: (B, L, T) int64, the position of each window slot in the flattened (B * N) batch;
            slots in the padding hold B * N.
        slots: (B, N) int64, the inverse: the position of each token among the B * L * T slots.
    """

    tokens: Tensor
    slots: Tensor


class WindowRows(NamedTuple):
    """Where the queries, keys and values of attention windows are found, and its results.

    Attributes:
        windows: (A,) int64, which of the B * L windows attend, or None for all of them.
        tokens: (R,) int64, the tokens in them, window by window, in the flattened (B * N) batch; or
            None for all of them in their order.
        queries: (K,) int64, those among the R that need a query, or None for all.
        q_rows: (A * heads * T,) int64, rows of a (K, heads) table of queries; None without
            ``queries``. A slot that needs no query has that of any token.
        kv_rows: (P * A * heads * T,) int64, rows of a (R [+ 1], P, heads) table of keys and values,
            P = 2, or without ``queries`` of queries, keys and values, P = 3. Slots in the padding
            read the row behind the last token.
        out_rows: (K * heads,) int64, rows of a (A, heads, T) table of results: those of the kept
            tokens.
        padded: Whether a slot reads the row behind the last token.
    """

    windows: Tensor | None
    tokens: Tensor | None
    queries: Tensor | None
    q_rows: Tensor | None
    kv_rows: Tensor
    out_rows: Tensor
    padded: bool


@cached
def window_layout(
    batch: int, hw: tuple[int, int], window_size: int, shift: int, device: torch.device
) -> WindowLayout:
    """Find where :func:`window_partition` puts the tokens of ``batch`` maps of size ``hw``."""
    token_BHWC = torch.arange(batch * hw[0] * hw[1], device=device).view(batch, *hw, 1)
    padding = token_BHWC.new_full((1,), token_BHWC.numel())
    token_AhTD = window_partition(token_BHWC, window_size, shift, padding)[0]
    slot_AhTD = torch.arange(token_AhTD.numel(), device=device).view(token_AhTD.shape)
    slot_BHWC = window_unpartition(slot_AhTD, hw, window_size, shift)
    tokens = token_AhTD.reshape(batch, -1, window_size**2)
    return WindowLayout(tokens, slot_BHWC.reshape(batch, -1))


def kept_window_rows(
    kept_K: Tensor,
    batch: int,
    hw: tuple[int, int],
    window_size: int,
    shift: int,
    heads: int,
    cell_size: int = 1,
) -> WindowRows:
    """Find the rows of the windows that hold a kept token, and of the kept tokens in them.

    How many windows there are depends on the decision. Where shapes may not depend on it
    (``shapes_may_vary``) all windows attend, or those that are cells of the decision.

    Args:
        kept_K: Positions in the flattened (B * N) batch of tokens, int64, as of
            ``cell_positions``.
        batch: Number of images.
        hw: Height and width of the maps.
        window_size: Side of a window, in tokens.
        shift: Cyclic shift, in tokens.
        heads: Attention heads.
        cell_size: Side of the decision's cells, in tokens. Defaults to 1.
    """
    device, t, count = kept_K.device, window_size**2, batch * hw[0] * hw[1]
    layout = window_layout(batch, hw, window_size, shift, device)
    slot_K = layout.slots.flatten().index_select(0, kept_K)
    window_K = slot_K // t
    if cell_size == window_size and shift == 0 and not shapes_may_vary(device):
        return _whole_cells(kept_K, window_K[::t], layout.tokens.flatten(0, 1) < count, heads)
    offset_K = slot_K - window_K * t
    place_AT, windows, tokens, queries = layout.tokens.flatten(0, 1), None, None, kept_K
    if shapes_may_vary(device):
        holds = torch.zeros(len(place_AT), dtype=torch.bool, device=device)
        holds = holds.index_fill_(0, window_K, True)
        if 10 * holds.sum() <= BREAK_EVEN_TENTHS * len(holds):
            windows = holds.nonzero().squeeze(1)
            tokens, place_AT = _places(place_AT.index_select(0, windows), count)
            count = len(tokens)
            window_K = (holds.cumsum(0) - 1).index_select(0, window_K)
            queries = place_AT.flatten().index_select(0, window_K * t + offset_K)
    out_rows = _out_rows(window_K, offset_K, t, heads)
    if not 0 < 10 * kept_K.shape[0] <= BREAK_EVEN_TENTHS * count:
        rows = (None, None, _head_rows(place_AT, 3, heads), out_rows)
        return WindowRows(windows, tokens, *rows, place_AT.numel() > count)
    query_of = torch.zeros(count + 1, dtype=torch.int64, device=device)
    query_of = query_of.index_copy(0, queries, torch.arange(queries.shape[0], device=device))
    q_rows = _head_rows(query_of[place_AT], 1, heads)
    rows = (queries, q_rows, _head_rows(place_AT, 2, heads), out_rows)
    return WindowRows(windows, tokens, *rows, place_AT.numel() > count)


def _whole_cells(kept_K: Tensor, windows_A: Tensor, inside_LT: Tensor, heads: int) -> WindowRows:
    """Find the rows of windows that are the kept cells, with static shapes: K = A * T."""
    inside_AT = inside_LT.index_select(0, windows_A)
    entry_K, t = torch.arange(kept_K.shape[0], device=kept_K.device), inside_AT.shape[1]
    place_AT = entry_K.view(inside_AT.shape).where(inside_AT, kept_K.shape[0])
    # What is outside of the map repeats the first token of its cell.
    offset_K = (entry_K % t) * inside_AT.flatten()
    out_rows = _out_rows(entry_K // t, offset_K, t, heads)
    return WindowRows(
        windows_A, kept_K, None, None, _head_rows(place_AT, 3, heads), out_rows, padded=True
    )


def _places(token_AT: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """List the tokens (R,) of windows; return them and for each slot its place, or R in padding."""
    inside_AT = token_AT < padding
    tokens = token_AT[inside_AT]
    place_AT = inside_AT.flatten().cumsum(0).view_as(token_AT) - 1
    return tokens, place_AT.where(inside_AT, len(tokens))


def _out_rows(window: Tensor, offset: Tensor, slots: int, heads: int) -> Tensor:
    """Rows of a (windows, heads, slots) table for every head of the tokens at these offsets."""
    first = window * (heads * slots) + offset
    return (first.unsqueeze(-1) + torch.arange(heads, device=first.device) * slots).flatten()


def _head_rows(place_AT: Tensor, parts: int, heads: int) -> Tensor:
    """Rows of a (places, parts, heads) table that make it (parts, A, heads, T), flattened."""
    device = place_AT.device
    part = torch.arange(parts, device=device).view(-1, 1, 1, 1)
    head = torch.arange(heads, device=device).view(-1, 1)
    return ((place_AT[:, None] * parts + part) * heads + head).flatten()


@cached
def shift_mask(grid: tuple[int, int], window_size: int, shift: int, device: torch.device) -> Tensor:
    """Attention mask that keeps regions apart which the cyclic shift brought into one window.

    Returns:
        (rows, cols, 1, T, T) float32 for a ``grid`` of rows and columns of windows, 0 within a
        region and -1000 across regions; it differs from 0 in the last row and the last column of
        windows only. Swin's is -100, whose softmax on a CPU is not zero but denormal, which slows
        the product with the values down many times.
    """
    region = []
    for count in grid:
        coords = torch.arange(count * window_size, device=device)
        end = count * window_size
        region.append((coords >= end - window_size).long() + (coords >= end - shift).long())
    ids = region[0][:, None] * 3 + region[1]
    ids = ids.view(grid[0], window_size, grid[1], window_size).transpose(1, 2)
    ids = ids.reshape(*grid, 1, window_size**2)
    across = ids[..., :, None] != ids[..., None, :]
    return across.float() * -1000.0


def relative_position_index(window_size: int) -> Tensor:
    """Row of the bias table for each pair of tokens of a window, (T, T) int64 (Swin, sec. 3.2)."""
    side = torch.arange(window_size)
    y, x = (c.flatten() for c in torch.meshgrid(side, side, indexing='ij'))
    dy = y[:, None] - y + window_size - 1
    dx = x[:, None] - x + window_size - 1
    return dy * (2 * window_size - 1) + dx
