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

# Share of windows with a kept token above which attention in all of them is as fast (benchmarks/).
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


class KeptWindows(NamedTuple):
    """The windows that hold a kept token.

    Attributes:
        windows: (A,) int64, which of the B * L windows, or None for all of them.
        tokens: (R,) int64, the tokens in them, window by window, in the flattened (B * N) batch; or
            None for all of them in their order.
        qkv_rows: (3 * A * heads * T,) int64, as of ``head_rows``, of the tokens listed.
        out_rows: (K * heads,) int64, rows of a (A, heads, T) table that belong to kept tokens.
    """

    windows: Tensor | None
    tokens: Tensor | None
    qkv_rows: Tensor
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
def head_rows(
    batch: int, hw: tuple[int, int], window_size: int, shift: int, heads: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Spell a window layout out for every attention head.

    Returns:
        The rows that turn a ``(B * N [+ 1], 3, heads)`` table of head vectors into queries, keys
        and values of shape (3, B, L, heads, T), flattened; and those that turn a (B, L, heads, T)
        table of results into (B, N, heads), flattened. Both int64.
    """
    layout = window_layout(batch, hw, window_size, shift, device)
    t = window_size**2
    head_H1 = torch.arange(heads, device=device).view(heads, 1)
    part_3 = torch.arange(3, device=device).view(3, 1, 1, 1, 1)
    qkv_rows = (layout.tokens[:, :, None] * 3 + part_3) * heads + head_H1
    window = layout.slots // t
    slot = layout.slots - window * t
    out_rows = (window[..., None] * heads + head_H1[:, 0]) * t + slot[..., None]
    return qkv_rows.flatten(), out_rows.flatten()


def kept_windows(
    kept_K: Tensor, batch: int, hw: tuple[int, int], window_size: int, shift: int, heads: int
) -> KeptWindows:
    """Find the windows that hold a kept token.

    How many there are depends on the decision. Where shapes must be static, in compiled code and
    on CUDA, it is always all of them.

    Args:
        kept_K: Positions in the flattened (B * N) batch of tokens, int64.
        batch: Number of images.
        hw: Height and width of the maps.
        window_size: Side of a window, in tokens.
        shift: Cyclic shift, in tokens.
        heads: Attention heads.
    """
    device = kept_K.device
    if torch.compiler.is_compiling() or kept_K.is_cuda:
        return _all_windows(kept_K, batch, hw, window_size, shift, heads)
    layout, t = window_layout(batch, hw, window_size, shift, device), window_size**2
    slot_K = layout.slots.flatten().index_select(0, kept_K)
    window_K = slot_K.div(t, rounding_mode='floor')
    count = layout.tokens.shape[0] * layout.tokens.shape[1]
    windows = torch.zeros(count, dtype=torch.bool).index_fill_(0, window_K, True).nonzero()[:, 0]
    if len(windows) > BREAK_EVEN * count:
        return _all_windows(kept_K, batch, hw, window_size, shift, heads)
    token_AT = layout.tokens.view(-1, t).index_select(0, windows)
    inside_AT = token_AT < batch * hw[0] * hw[1]
    tokens = token_AT[inside_AT]
    # What stands in the padding reads the row behind the last token.
    row_AT = inside_AT.flatten().cumsum(0).view(-1, t) - 1
    row_A1T = row_AT.where(inside_AT, len(tokens)).unsqueeze(1)
    head_H1 = torch.arange(heads).view(heads, 1)
    qkv_rows = (row_A1T * 3 + torch.arange(3).view(3, 1, 1, 1)) * heads + head_H1
    rank = torch.empty(count, dtype=torch.int64)
    rank[windows] = torch.arange(len(windows))
    first_K = rank.index_select(0, window_K) * (heads * t) + slot_K - window_K * t
    out_rows = first_K[:, None] + torch.arange(heads) * t
    return KeptWindows(windows, tokens, qkv_rows.flatten(), out_rows.flatten())


def _all_windows(
    kept_K: Tensor, batch: int, hw: tuple[int, int], window_size: int, shift: int, heads: int
) -> KeptWindows:
    qkv_rows, out_rows = head_rows(batch, hw, window_size, shift, heads, kept_K.device)
    out_rows = out_rows.view(-1, heads).index_select(0, kept_K).flatten()
    return KeptWindows(None, None, qkv_rows, out_rows)


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
