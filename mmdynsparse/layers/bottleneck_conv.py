"""The bottleneck convolution that stands in the place of a self-attention (SPViT).

Source: He et al., *Pruning Self-attentions into Convolutional Layers in Single Path* (arXiv
2111.11802). Dimension letters: B images, N = H * W locations, C channels, D channels of a head, R
listed and K kept locations of all images.
"""

from typing import NamedTuple

from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..ops import region


class ConvRows(NamedTuple):
    """What a convolution reads and returns where only kept locations are computed.

    Attributes:
        tokens: (K,) int64, the locations to read, for a 1 x 1 convolution; None for all.
        out_rows: (K,) int64, which of the results are returned; None for all.
    """

    tokens: Tensor | None
    out_rows: Tensor | None


class BottleneckConv(BaseModule):
    """Convolution to the channels of a head, batch norm, ReLU and a linear layer back.

    Args:
        embed_dims: Channels C.
        num_heads: Heads of the attention that it replaces; D = C / num_heads.
        kernel_size: 1 or 3. The map is padded with zeros.
        norm_cfg: The norm over D channels.
        bias: Whether the convolution has a bias. Defaults to True.
        out_bias: Whether the linear layer has a bias. Defaults to True.
        proj_drop_rate: Dropout of the output. Defaults to 0.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        kernel_size: int,
        norm_cfg: dict,
        bias: bool = True,
        out_bias: bool = True,
        proj_drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        dims = embed_dims // num_heads
        self.reduce = nn.Conv2d(embed_dims, dims, kernel_size, padding=kernel_size // 2, bias=bias)
        self.norm = build_norm_layer(norm_cfg, dims)[1]
        self.act = nn.ReLU()
        self.expand = nn.Conv2d(dims, embed_dims, 1, bias=out_bias)
        self.proj_drop = nn.Dropout(proj_drop_rate)

    def forward(self, x: Tensor, hw: tuple[int, int], rows: ConvRows | None = None) -> Tensor:
        """Convolve a map, or compute its kept locations alone.

        Args:
            x: Tokens of the map (B, N, C), or with ``rows`` those that it lists, (R, C).
            hw: Height and width of the map.
            rows: From ``kept_rows``. Defaults to None, all locations.

        Returns:
            The update: of all locations, (B, N, C), or with ``rows`` of the kept ones, (K, C).
        """
        with region('attention'):
            if rows is None:
                return self._convolve(x, hw)
            if rows.out_rows is None:  # single locations, whatever their places
                return self._convolve(x.unsqueeze(0), (len(x), 1)).squeeze(0)
            update = self._convolve(x.view(-1, hw[0] * hw[1], x.shape[1]), hw)
            return update.flatten(0, 1).index_select(0, rows.out_rows)

    def kept_rows(
        self, kept_K: Tensor, batch: int, hw: tuple[int, int], cell_size: int = 1
    ) -> ConvRows:
        """Find what ``forward`` reads: the kept locations, or all for a 3 x 3 convolution."""
        return ConvRows(kept_K, None) if self.kernel_size == 1 else ConvRows(None, kept_K)

    def rows_key(self, hw: tuple[int, int]) -> str:
        """Return what ``kept_rows`` depends on beside the decision and the map."""
        return f'conv{self.kernel_size}'

    def _convolve(self, x_BNC: Tensor, hw: tuple[int, int]) -> Tensor:
        if x_BNC.shape[1] == 0:  # nothing is kept
            return x_BNC
        x = x_BNC.transpose(1, 2).unflatten(2, hw)
        x = self.expand(self.act(self.norm(self.reduce(x))))
        return self.proj_drop(x.flatten(2).transpose(1, 2))
