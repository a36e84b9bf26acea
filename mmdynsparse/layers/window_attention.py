"""Shifted-window attention with the parameters of OpenMMLab's Swin (Swin, sections 3.2-3.3).

Padding, shift, partition and the split into heads are one gather of head vectors, their reverse
another; tokens of the padding never pass through the projections. Dimension letters: B images,
N = H * W tokens, C channels, L windows of one image, T tokens of a window, h heads, D = C / h.
"""

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..ops import head_rows, region, relative_position_index, shift_mask
from .linear import Linear


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

    def attend(self, qkv_3BLhTD: Tensor, mask: Tensor | None) -> Tensor:
        """Attend within each window.

        Args:
            qkv_3BLhTD: Queries, keys and values, (3, B, L, h, T, D).
            mask: (rows, cols, 1, T, T) from ``shift_mask``, L = rows * cols, or None.

        Returns:
            (B, L, h, T, D)
        """
        q, k, v = qkv_3BLhTD.unbind(0)
        attn = (q * self.scale) @ k.transpose(-2, -1)
        attn = attn + self._bias()
        if mask is not None:
            # Only windows of the last row and the last column hold more than one region.
            grid = attn.unflatten(1, mask.shape[:2])
            grid[:, -1] += mask[-1]
            grid[:, :-1, -1] += mask[:-1, -1]
        return self.attn_drop(attn.softmax(-1)) @ v

    def _bias(self) -> Tensor:
        index_TT = self.relative_position_index
        bias = self.relative_position_bias_table.index_select(0, index_TT.flatten())
        return bias.t().reshape(-1, *index_TT.shape)


class ShiftWindowMSA(BaseModule):
    """Window attention over a map, shifted by half a window or not.

    Attributes:
        shift_small_maps: Whether a map that fits into one window along its shorter side is
            shifted all the same, as in mmseg and mmdet, or not, as in the original Swin.

    Args:
        embed_dims: Channels C.
        num_heads: Attention heads, a divisor of C.
        window_size: Side of a window, in tokens.
        shift_size: Cyclic shift, in tokens, 0 <= shift_size < window_size. Defaults to 0.
        proj_drop_rate: Dropout of the output. Defaults to 0.
        **kwargs: Further arguments of :class:`WindowMSA`.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window_size: int,
        shift_size: int = 0,
        proj_drop_rate: float = 0.0,
        **kwargs,
    ) -> None:
        super().__init__()
        assert 0 <= shift_size < window_size
        self.window_size = window_size
        self.shift_size = shift_size
        self.shift_small_maps = True
        self.w_msa = WindowMSA(embed_dims, num_heads, window_size, **kwargs)
        self.proj_drop = nn.Dropout(proj_drop_rate)

    def forward(self, x_BNC: Tensor, hw: tuple[int, int]) -> Tensor:
        """Return the attended tokens (B, N, C) of a map of ``hw`` tokens."""
        with region('attention'):
            return self._forward(x_BNC, hw)

    def _forward(self, x_BNC: Tensor, hw: tuple[int, int]) -> Tensor:
        (b, n, c), heads = x_BNC.shape, self.w_msa.num_heads
        shift = self._shift(hw)
        qkv_rows, out_rows = head_rows(b, hw, self.window_size, shift, heads, x_BNC.device)
        x = x_BNC.reshape(b * n, c)
        if qkv_rows.numel() > 3 * b * n * heads:
            # Slots in the padding hold a zero token; its keys and values are the biases.
            x = torch.cat((x, x.new_zeros(1, c)))
        qkv = self.w_msa.qkv(x).view(-1, c // heads).index_select(0, qkv_rows)
        qkv = qkv.view(3, b, -1, heads, self.window_size**2, c // heads)
        grid = tuple(-(-side // self.window_size) for side in hw)
        mask = shift_mask(grid, self.window_size, shift, x.device) if shift else None
        out = self.w_msa.attend(qkv, mask)
        out = out.reshape(-1, c // heads).index_select(0, out_rows).view(b, n, c)
        return self.proj_drop(self.w_msa.proj(out))

    def _shift(self, hw: tuple[int, int]) -> int:
        fits = min(hw) <= self.window_size
        return 0 if fits and not self.shift_small_maps else self.shift_size
