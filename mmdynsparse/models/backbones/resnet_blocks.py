"""Residual blocks of ResNet that can be evaluated in chosen cells.

Sources and design: see ``resnet.py``. Dimension letters: B images, C channels, K kept and M
dropped cells of g x g positions, P = B * H * W rows of a table (see ``ops.cells``).
"""

from typing import ClassVar, NamedTuple

import torch.utils.checkpoint as cp
from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn

from ...layers import conv_norm, fold_norm
from ...ops import CellRows, put_rows, region, table_map, take_tiles, tile_rows
from ...ops.kernels import get_kernel
from .sparse_backbone import build_part


class Cells(NamedTuple):
    """Kept and dropped cells of a batch of maps.

    Attributes:
        index: (K,) int64, the kept cells.
        kept: Their rows, for one halo.
        dropped: (M * g * g,) int64, rows of the dropped cells.
        size: Side g of a cell, in positions.
        batch: Number of images.
        hw: Height and width of the maps.
        fused: Whether convolutions in kept cells run in Triton kernels.
    """

    index: Tensor
    kept: CellRows
    dropped: Tensor
    size: int
    batch: int
    hw: tuple[int, int]
    fused: bool


class ResidualBlock(BaseModule):
    """What basic blocks and bottlenecks share: identity, mask, fast path.

    A block that changes the size of the map, or its channels, projects the identity and is always
    dense.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels C of the output.
        stride: Of the block.
        avg_down: Whether the projection strides by average pooling.
        norm_cfg: Normalization.
        with_cp: Whether activations are recomputed in the backward pass.
        fast_path: Config of the fast path, or None: dropped positions stay as they are.
    """

    expansion: ClassVar[int]
    halo: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        avg_down: bool,
        norm_cfg: dict,
        with_cp: bool,
        fast_path: dict | None,
    ) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            pool = [nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)]
            conv_stride = 1 if avg_down else stride
            self.downsample = nn.Sequential(
                *(pool if avg_down else ()),
                nn.Conv2d(in_channels, out_channels, 1, conv_stride, bias=False),
                build_norm_layer(norm_cfg, out_channels)[1],
            )
        self.with_cp = with_cp
        self.fast_path = build_part(fast_path, out_channels) if fast_path else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the block's output (B, C, H', W').

        Args:
            x: Map (B, C_in, H, W).
            mask: (B, 1, H, W), 1 where the branch applies and 0 where the fast path does.
                Defaults to None, the branch everywhere.
        """
        if self.with_cp and x.requires_grad:
            return cp.checkpoint(self._forward, x, mask, use_reentrant=False)
        return self._forward(x, mask)

    def _forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        out = self._branch(x)
        if mask is not None:
            mask = mask.to(out.dtype)
            out = out * mask
            if self.fast_path is not None:
                fast = self.fast_path(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
                out = out + fast * (1 - mask)
        out += self._identity(x)
        return self.relu(out)

    def update_cells(self, table: Tensor, cells: Cells) -> None:
        """Apply the block to a table of rows (see ``ops.cells``), in place.

        Args:
            table: (P + 2, C), from ``cell_table``.
            cells: The kept cells, with rows for this block's halo.
        """
        kept = cells.kept
        # Both paths read the table before either writes to it.
        slow = None
        if len(kept.inner) > 0:
            with region('slow path'):
                slow = self._branch_in_cells(table, cells)
            with region('gather'):
                slow += table.index_select(0, kept.inner)
        if self.fast_path is not None:
            with region('gather'):
                x = table.index_select(0, cells.dropped)
            with region('fast path'):
                fast = self.relu(self.fast_path(x) + x)
            with region('scatter'):
                put_rows(table, cells.dropped, fast)
        if slow is not None:
            with region('scatter'):
                put_rows(table, kept.inner, self.relu(slow))

    def _identity(self, x: Tensor) -> Tensor:
        if self.downsample is None:
            return x
        *pool, conv, norm = self.downsample
        for layer in pool:
            x = layer(x)
        return conv_norm(x, conv, norm)

    def _branch(self, x: Tensor) -> Tensor:
        """Return the residual (B, C, H', W') of a map."""
        raise NotImplementedError

    def _branch_in_cells(self, table: Tensor, cells: Cells) -> Tensor:
        """Return the residual of the kept cells' positions, (K * g * g, C)."""
        raise NotImplementedError

    def _fused_conv(
        self, table: Tensor, cells: Cells, conv: nn.Conv2d, norm: nn.Module, relu: bool
    ) -> Tensor:
        """Apply the first layer everywhere and the given one in kept cells, (K, C, g, g)."""
        x = table_map(table, cells.batch, cells.hw)
        x = self.relu(conv_norm(x, self.conv1, self.bn1))
        cell_conv = get_kernel('cell_conv')
        weight, bias = fold_norm(conv, norm)
        return cell_conv(x, cells.index, cells.size, weight, bias, conv.dilation[0], relu)


class BasicBlock(ResidualBlock):
    """Two 3 x 3 convolutions (He et al., fig. 5 left).

    Args:
        in_channels: Channels of the input.
        planes: Channels of the convolutions.
        stride: Of the first convolution.
        dilation: Of the first convolution.
        style: Not used, see :class:`Bottleneck`.
        norm_cfg: Normalization.
        **kwargs: Further arguments of :class:`ResidualBlock`.
    """

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int,
        dilation: int,
        style: str,
        norm_cfg: dict,
        **kwargs,
    ) -> None:
        super().__init__(in_channels, planes, stride, norm_cfg=norm_cfg, **kwargs)
        self.halo = dilation + 1
        self.conv1 = nn.Conv2d(
            in_channels, planes, 3, stride, padding=dilation, dilation=dilation, bias=False
        )
        self.bn1 = build_norm_layer(norm_cfg, planes)[1]
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = build_norm_layer(norm_cfg, planes)[1]

    def _branch(self, x: Tensor) -> Tensor:
        x = self.relu(conv_norm(x, self.conv1, self.bn1))
        return conv_norm(x, self.conv2, self.bn2)

    def _branch_in_cells(self, table: Tensor, cells: Cells) -> Tensor:
        if cells.fused:
            return tile_rows(self._fused_conv(table, cells, self.conv2, self.bn2, relu=False))
        side, tile = cells.size + 2 * self.halo, cells.kept.tile
        with region('gather'):
            x = take_tiles(table, tile, side)
        x = self.relu(conv_norm(x, self.conv1, self.bn1, halo=self.halo - 1))
        # The second convolution is padded with zeros, not with what the first gives there.
        inside = tile.view(-1, 1, side, side) < len(table) - 2
        margin = self.halo - 1
        x = x * inside[:, :, margin:-margin, margin:-margin].to(x.dtype)
        return tile_rows(conv_norm(x, self.conv2, self.bn2, halo=1))


class Bottleneck(ResidualBlock):
    """1 x 1, 3 x 3 and 1 x 1 convolution (He et al., fig. 5 right).

    Args:
        in_channels: Channels of the input.
        planes: Channels of the first two convolutions; the output has four times as many.
        stride: Of the second convolution in style 'pytorch', of the first in style 'caffe'.
        dilation: Of the second convolution.
        style: 'pytorch' or 'caffe'.
        norm_cfg: Normalization.
        **kwargs: Further arguments of :class:`ResidualBlock`.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int,
        dilation: int,
        style: str,
        norm_cfg: dict,
        **kwargs,
    ) -> None:
        super().__init__(in_channels, 4 * planes, stride, norm_cfg=norm_cfg, **kwargs)
        self.halo = dilation
        stride1, stride2 = (1, stride) if style == 'pytorch' else (stride, 1)
        self.conv1 = nn.Conv2d(in_channels, planes, 1, stride1, bias=False)
        self.bn1 = build_norm_layer(norm_cfg, planes)[1]
        self.conv2 = nn.Conv2d(
            planes, planes, 3, stride2, padding=dilation, dilation=dilation, bias=False
        )
        self.bn2 = build_norm_layer(norm_cfg, planes)[1]
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = build_norm_layer(norm_cfg, 4 * planes)[1]

    def _branch(self, x: Tensor) -> Tensor:
        x = self.relu(conv_norm(x, self.conv1, self.bn1))
        x = self.relu(conv_norm(x, self.conv2, self.bn2))
        return conv_norm(x, self.conv3, self.bn3)

    def _branch_in_cells(self, table: Tensor, cells: Cells) -> Tensor:
        if cells.fused:
            x = self._fused_conv(table, cells, self.conv2, self.bn2, relu=True)
            return tile_rows(conv_norm(x, self.conv3, self.bn3))
        kept = cells.kept
        with region('gather'):
            # As one image of R x 1 positions: R images of one position are several times slower.
            near = table.index_select(0, kept.near).view(1, -1, 1, table.shape[1])
        near = conv_norm(near.permute(0, 3, 1, 2), self.conv1, self.bn1)
        near = tile_rows(self.relu(near))
        with region('gather'):
            # One more row, of zeros, for the padding of the 3 x 3 convolution.
            near = nn.functional.pad(near, (0, 0, 0, 1))
            x = take_tiles(near, kept.tile_of_near, cells.size + 2 * self.halo)
        x = self.relu(conv_norm(x, self.conv2, self.bn2, halo=self.halo))
        return tile_rows(conv_norm(x, self.conv3, self.bn3))
