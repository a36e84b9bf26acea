"""Where the tokens of a map stand in its attention windows.

Pure functions of shapes. Padding to whole windows, the cyclic shift and the partition into
windows are one permutation, so they cost one gather instead of four copies of the map. Dimension
letters: B images, L windows of one image, T = window_size ** 2 tokens of a window, N = H * W; of
a decision, K kept tokens, A windows that hold one and R tokens in these.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .caching import cached

# Share of windows that attend, or of tokens with a query, above which all of them do: no more than
# a tenth would be saved.
BREAK_EVEN = 0.9


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
        out_rows: Rows of a (A, heads, T) table of results that are those of the B * N tokens, or
            of the K kept ones, for each head.
    """

    windows: Tensor | None
    tokens: Tensor | None
    queries: Tensor | None
    q_rows: Tensor | None
    kv_rows: Tensor
    out_rows: Tensor


@cached
def window_layout(
    batch: int, hw: tuple[int, int], window_size: int, shift: int, device: torch.device
) -> WindowLayout:
    """Lay out windows as Swin does: pad right and bottom, roll by ``-shift``, partition.

    Args:
        batch: Number of images.
        hw: Height and width of the maps.
        window_size: Side of a window, in tokens.
        shift: Cyclic shift towards the top left, in tokens, 0 <= shift < window_size.
        device: Where the index tensors are put.
    """
    h, w = hw
    rows, cols = -(-h // window_size), -(-w // window_size)
    end_y, end_x = rows * window_size, cols * window_size
    image_B11 = torch.arange(batch, device=device).view(batch, 1, 1)

    # Closed forms, which a compiler computes where they are read: first what a slot holds.
    y, x = _rolled(end_y, shift, end_y, device), _rolled(end_x, shift, end_x, device)
    y, x = y.view(rows, 1, window_size, 1), x.view(cols, 1, window_size)
    token_LT = (y * w + x).reshape(rows * cols, -1)
    inside_LT = ((y < h) & (x < w)).reshape(rows * cols, -1)
    tokens = torch.where(inside_LT, token_LT + image_B11 * (h * w), batch * h * w)

    # Then where a token stands.
    y, x = _rolled(h, end_y - shift, end_y, device), _rolled(w, end_x - shift, end_x, device)
    row, col = (y // window_size).view(h, 1), x // window_size
    y, x = y.view(h, 1) - row * window_size, x - col * window_size
    slot_HW = (row * cols + col) * window_size**2 + y * window_size + x
    slots = slot_HW.flatten() + image_B11[..., 0] * (end_y * end_x)
    return WindowLayout(tokens, slots)


def _rolled(count: int, shift: int, end: int, device: torch.device) -> Tensor:
    """Return ``(i + shift) % end`` for i < count <= end; inductor fails on the ``%`` itself."""
    i = torch.arange(count, device=device) + shift
    return torch.where(i < end, i, i - end)


@cached
def window_rows(
    batch: int, hw: tuple[int, int], window_size: int, shift: int, heads: int, device: torch.device
) -> WindowRows:
    """Find the rows of all windows and all tokens.

    Args:
        batch: Number of images.
        hw: Height and width of the maps.
        window_size: Side of a window, in tokens.
        shift: Cyclic shift, in tokens.
        heads: Attention heads.
        device: Where the index tensors are put.
    """
    layout, t = window_layout(batch, hw, window_size, shift, device), window_size**2
    window = layout.slots // t
    out_rows = _out_rows(window, layout.slots - window * t, t, heads)
    kv_rows = _head_rows(layout.tokens.flatten(0, 1), 3, heads)
    return WindowRows(None, None, None, None, kv_rows, out_rows)


def kept_window_rows(
    kept_K: Tensor, batch: int, hw: tuple[int, int], window_size: int, shift: int, heads: int
) -> WindowRows:
    """Find the rows of the windows that hold a kept token, and of the kept tokens in them.

    How many windows there are depends on the decision. Where shapes must be static, in compiled
    code and on CUDA, it is always all of them.

    Args:
        kept_K: Positions in the flattened (B * N) batch of tokens, int64.
        batch: Number of images.
        hw: Height and width of the maps.
        window_size: Side of a window, in tokens.
        shift: Cyclic shift, in tokens.
        heads: Attention heads.
    """
    device, t, count = kept_K.device, window_size**2, batch * hw[0] * hw[1]
    layout = window_layout(batch, hw, window_size, shift, device)
    slot_K = layout.slots.flatten().index_select(0, kept_K)
    window_K = slot_K // t
    offset_K = slot_K - window_K * t
    place_AT, windows, tokens, queries = layout.tokens.flatten(0, 1), None, None, kept_K
    if not (torch.compiler.is_compiling() or kept_K.is_cuda):
        holds = torch.zeros(len(place_AT), dtype=torch.bool).index_fill_(0, window_K, True)
        if holds.sum() <= BREAK_EVEN * len(holds):
            windows = holds.nonzero().squeeze(1)
            tokens, place_AT = _places(place_AT.index_select(0, windows), count)
            count = len(tokens)
            window_K = (holds.cumsum(0) - 1).index_select(0, window_K)
            queries = place_AT.flatten().index_select(0, window_K * t + offset_K)
    out_rows = _out_rows(window_K, offset_K, t, heads)
    if not 0 < len(kept_K) <= BREAK_EVEN * count:
        return WindowRows(windows, tokens, None, None, _head_rows(place_AT, 3, heads), out_rows)
    query_of = torch.zeros(count + 1, dtype=torch.int64, device=device)
    query_of = query_of.index_copy(0, queries, torch.arange(len(queries), device=device))
    q_rows = _head_rows(query_of[place_AT], 1, heads)
    return WindowRows(windows, tokens, queries, q_rows, _head_rows(place_AT, 2, heads), out_rows)


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
        region and -100 across regions, as Swin's; it differs from 0 in the last row and the last
        column of windows only.
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
    return across.float() * -100.0


def relative_position_index(window_size: int) -> Tensor:
    """Row of the bias table for each pair of tokens of a window, (T, T) int64 (Swin, sec. 3.2)."""
    side = torch.arange(window_size)
    y, x = (c.flatten() for c in torch.meshgrid(side, side, indexing='ij'))
    dy = y[:, None] - y + window_size - 1
    dx = x[:, None] - x + window_size - 1
    return dy * (2 * window_size - 1) + dx
