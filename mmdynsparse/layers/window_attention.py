"""Shifted-window attention with the parameters of OpenMMLab's Swin (Swin, sections 3.2-3.3).

The projections see the tokens of the map only: a padded token is zero, so its queries, keys and
values are the biases. Dimension letters: B images, N = H * W tokens, C channels, L windows of one
image, T tokens of a window, h heads, D = C / h; A windows and R tokens in them, of all images, K
kept tokens.
"""

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..ops import (
    WindowRows,
    cell_grid,
    is_exporting,
    kept_window_rows,
    linear,
    region,
    relative_position_index,
    shift_mask,
    window_partition,
    window_unpartition,
)
from ..ops.rows import plain_inference
from .linear import Linear
from .plain import is_plain


class WindowMSA(BaseModule):
    """Multi-head self-attention within windows, with relative position bias.

    Args:
        embed_dims: Channels C.
        num_heads: Attention heads, a divisor of C.
        window_size: Side of a window, in tokens.
        qkv_bias: Whether queries, keys and values have a bias. Defaults to True.
        qk_scale: Scale of the logits. Defaults to None, D ** -0.5.
        attn_drop_rate: Dropout of the attention weights. Defaults to 0.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window_size: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale or (embed_dims // num_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * window_size - 1) ** 2, num_heads)
        )
        self.register_buffer('relative_position_index', relative_position_index(window_size))
        self.qkv = Linear(embed_dims, embed_dims * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop_rate)
        self.proj = Linear(embed_dims, embed_dims)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, windows: Tensor | None = None
    ) -> Tensor:
        """Attend within each window.

        The explicit softmax is faster on a CPU, where windows of 7 x 7 took 1.3 ms and
        ``scaled_dot_product_attention`` 2.3 ms. It is not measured elsewhere.

        Args:
            q: Queries, (A, h, T, D).
            k: Keys, likewise.
            v: Values, likewise.
            mask: (rows, cols, 1, T, T) from ``shift_mask``, or None.
            windows: (A,) int64, which of the B * rows * cols windows these are. Defaults to None,
                all of them.

        Returns:
            (A, h, T, D)
        """
        if q.device.type != 'cpu':
            return self._fused(q, k, v, mask)
        attn = self._logits(q, k, mask, windows)
        return self.attn_drop(attn.softmax(-1)) @ v

    def _logits(self, q: Tensor, k: Tensor, mask: Tensor | None, windows: Tensor | None) -> Tensor:
        bias, k = self._bias(), k.transpose(-2, -1)
        if not plain_inference(q) or q.dtype != bias.dtype:
            logits = (q * self.scale) @ k + bias
            return logits if mask is None else self._add_mask(logits, mask, windows)
        # The product is added to the bias: two passes over memory less.
        logits = bias.expand(len(q), -1, -1, -1).contiguous()
        if mask is not None:
            self._add_mask(logits, mask, windows)
        out, factors = logits.flatten(0, 1), (q.flatten(0, 1), k.flatten(0, 1))
        return torch.baddbmm(out, *factors, alpha=self.scale, out=out).view_as(logits)

    def _add_mask(self, logits: Tensor, mask: Tensor, windows: Tensor | None) -> Tensor:
        """Add the mask in place, to the last row and the last column: elsewhere it is 0."""
        rows, cols = mask.shape[:2]
        if is_exporting():  # a part of a tensor would become a scatter
            return (logits.unflatten(0, (-1, rows, cols)) + mask).flatten(0, 2)
        if windows is None:
            grid = logits.unflatten(0, (-1, rows, cols))
            grid[:, -1] += mask[-1]
            grid[:, :-1, -1] += mask[:-1, -1]
            return logits
        place = windows % (rows * cols)
        at_edge = (place >= (rows - 1) * cols) | (place % cols == cols - 1)
        edge = at_edge.nonzero().squeeze(1)
        masks = mask.flatten(0, 1).index_select(0, place.index_select(0, edge))
        masks = masks.to(logits.dtype).expand(-1, logits.shape[1], -1, -1)
        return logits.index_add_(0, edge, masks)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        bias, shape = self._bias(), q.shape
        if mask is not None:
            # The windows of an image count as heads: the images share one mask.
            bias = (bias + mask.flatten(0, 1)).flatten(0, 1)
            q, k, v = (part.reshape(-1, len(bias), *shape[2:]) for part in (q, k, v))
        drop = self.attn_drop.p if self.training else 0.0
        bias = bias.to(q.dtype).unsqueeze(0)
        out = F.scaled_dot_product_attention(q, k, v, bias, drop, scale=self.scale)
        return out.reshape(shape)

    def _bias(self) -> Tensor:
        index_TT = self.relative_position_index
        bias = self.relative_position_bias_table.index_select(0, index_TT.flatten())
        return bias.t().reshape(-1, *index_TT.shape)


class ShiftWindowMSA(BaseModule):
    """Window attention over a map, shifted or not.

    Args:
        embed_dims: Channels C.
        num_heads: Attention heads, a divisor of C.
        window_size: Side of a window, in tokens.
        shift_size: Cyclic shift, in tokens, 0 <= shift_size < window_size. Defaults to 0.
        proj_drop_rate: Dropout of the output. Defaults to 0.
        shift_small_maps: Whether a map is shifted whose shorter side fits into one window: True as
            in mmseg and mmdet, False as in the original Swin repository. Defaults to True.
        **kwargs: Further arguments of :class:`WindowMSA`.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window_size: int,
        shift_size: int = 0,
        proj_drop_rate: float = 0.0,
        shift_small_maps: bool = True,
        **kwargs,
    ) -> None:
        super().__init__()
        assert 0 <= shift_size < window_size
        self.window_size = window_size
        self.shift_size = shift_size
        self.shift_small_maps = shift_small_maps
        self.w_msa = WindowMSA(embed_dims, num_heads, window_size, **kwargs)
        self.proj_drop = nn.Dropout(proj_drop_rate)

    def forward(self, x: Tensor, hw: tuple[int, int], rows: WindowRows | None = None) -> Tensor:
        """Attend within the windows of a map, or in those alone that hold a kept token.

        Args:
            x: Tokens of the map (B, N, C), or with ``rows`` those that it lists, (R, C).
            hw: Height and width of the map.
            rows: From ``kept_rows``. Defaults to None, all tokens.

        Returns:
            The attended tokens: all, (B, N, C), or with ``rows`` the kept ones, (K, C).
        """
        with region('attention'):
            return self._attend(x, hw) if rows is None else self._attend_kept(x, hw, rows)

    def kept_rows(
        self, kept_K: Tensor, batch: int, hw: tuple[int, int], cell_size: int = 1
    ) -> WindowRows:
        """Find what ``forward`` reads, see :func:`mmdynsparse.ops.kept_window_rows`.

        It depends on the decision, the map and ``rows_key``.
        """
        window = (self.window_size, self.shift(hw), self.w_msa.num_heads)
        return kept_window_rows(kept_K, batch, hw, *window, cell_size)

    def _attend(self, x_BNC: Tensor, hw: tuple[int, int]) -> Tensor:
        if is_exporting():  # cutting and rolling would be a dozen copies; an index is one
            everything = torch.arange(x_BNC.shape[0] * x_BNC.shape[1], device=x_BNC.device)
            rows = self.kept_rows(everything, x_BNC.shape[0], hw)
            return self._attend_kept(x_BNC.flatten(0, 1), hw, rows).view_as(x_BNC)
        m, size, shift = self.w_msa, self.window_size, self.shift(hw)
        qkv = m.qkv(x_BNC).unflatten(1, hw)
        padding = m.qkv.bias
        if not is_plain(m.qkv, Linear):
            padding = m.qkv(x_BNC.new_zeros(1, x_BNC.shape[2]))[0]
        q, k, v = window_partition(qkv, size, shift, padding, (3, m.num_heads))
        out = m.attend(q, k, v, self._mask(hw, x_BNC.device))
        out = window_unpartition(out, hw, size, shift).reshape(x_BNC.shape)
        return self.proj_drop(m.proj(out))

    def _attend_kept(self, x_RC: Tensor, hw: tuple[int, int], rows: WindowRows) -> Tensor:
        q, k, v = self._project(x_RC, rows)
        out = self.w_msa.attend(q, k, v, self._mask(hw, x_RC.device), rows.windows)
        out = out.reshape(-1, q.shape[-1]).index_select(0, rows.out_rows)
        return self.proj_drop(self.w_msa.proj(out.view(-1, x_RC.shape[1])))

    def _mask(self, hw: tuple[int, int], device: torch.device) -> Tensor | None:
        grid, shift = cell_grid(hw, self.window_size), self.shift(hw)
        return shift_mask(grid, self.window_size, shift, device) if shift else None

    def _project(self, x_RC: Tensor, rows: WindowRows) -> tuple[Tensor, ...]:
        """Return queries, keys and values of the windows, each (A, h, T, D)."""
        qkv, c = self.w_msa.qkv, x_RC.shape[1]
        parts = 3 if rows.queries is None else 2
        padded_RC = x_RC
        if rows.padded:
            # Slots in the padding hold a zero token; its keys and values are the biases.
            padded_RC = torch.cat((x_RC, x_RC.new_zeros(1, c)))
        if rows.queries is None:
            return self._to_windows(qkv(padded_RC), rows.kv_rows, parts)
        if is_plain(qkv, Linear):
            w_q, w_kv = qkv.weight.split((c, 2 * c))
            b_q, b_kv = (None, None) if qkv.bias is None else qkv.bias.split((c, 2 * c))
            q = linear(x_RC.index_select(0, rows.queries), w_q, b_q)
            kv = linear(padded_RC, w_kv, b_kv)
        else:
            q = qkv(x_RC.index_select(0, rows.queries))[:, :c].contiguous()
            kv = qkv(padded_RC)[:, c:].contiguous()
        return self._to_windows(q, rows.q_rows, 1) + self._to_windows(kv, rows.kv_rows, parts)

    def _to_windows(self, y: Tensor, rows: Tensor, parts: int) -> tuple[Tensor, ...]:
        heads = self.w_msa.num_heads
        dims = y.shape[1] // (parts * heads)
        y = y.view(-1, dims).index_select(0, rows)
        return y.view(parts, -1, heads, self.window_size**2, dims).unbind(0)

    def rows_key(self, hw: tuple[int, int]) -> int:
        """Return what ``kept_rows`` depends on beside the decision and the map."""
        return self.shift(hw)

    def shift(self, hw: tuple[int, int]) -> int:
        """Return the cyclic shift on a map of this height and width, in tokens."""
        fits = min(hw) <= self.window_size
        return 0 if fits and not self.shift_small_maps else self.shift_size
