"""Residual blocks of ResNet that can be evaluated in chosen cells.

Sources and design: see ``resnet.py``. Dimension letters: B images, C channels, K kept and M
dropped cells of g x g positions, P = B * H * W rows of a table (see ``ops.cells``).
"""

from abc import abstractmethod
from collections.abc import Sequence
from itertools import chain
from typing import ClassVar, NamedTuple

from mmcv.cnn import build_conv_layer, build_norm_layer, build_plugin_layer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...layers import can_fold, conv_norm, fold_norm, is_plain
from ...ops import CellRows, put_rows, region, table_map, take_tiles, tile_rows
from ...ops.kernels import get_kernel
from ..decider import build_part
from .sparse_backbone import Block


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


class Layer(NamedTuple):
    """Shape of a convolution; its input comes from the one before."""

    channels: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1


class ResidualBlock(Block):
    """What basic blocks and bottlenecks share: layers, identity, mask, fast path.

    A block that changes the size of the map, or its channels, projects the identity and is always
    dense.

    Arguments are as of the backbone, with ``planes`` for the channels of the inner convolutions,
    ``dcn`` None in a stage without it, and the ``plugins`` of this stage. As in the original, the
    first block takes ``fallback_on_stride`` out of ``dcn``. Without a ``fast_path`` dropped
    positions stay as they are.

    Attributes:
        halo: Border around a cell that the branch reads, in positions.

    Raises:
        ValueError: If ``dcn`` or a plugin does not fit the block.
    """

    expansion: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int,
        dilation: int,
        style: str,
        avg_down: bool,
        conv_cfg: dict | None,
        norm_cfg: dict,
        dcn: dict | None,
        plugins: Sequence[dict],
        with_cp: bool,
        fast_path: dict | None,
    ) -> None:
        super().__init__(with_cp)
        if self.expansion == 1 and (dcn is not None or plugins):
            raise ValueError(f'dcn and plugins need a depth of 50 or more, got {dcn or plugins}')
        self.relu = nn.ReLU(inplace=True)
        self.halo = 0
        self.norm_names: list[str] = []
        if dcn is not None and dcn.pop('fallback_on_stride', False):
            dcn = None
        channels = in_channels
        for layer in self._geometry(planes, stride, dilation, style):
            cfg = dcn if dcn is not None and layer.kernel_size == 3 else conv_cfg
            self._add_layer(cfg, norm_cfg, channels, layer)
            channels = layer.channels
        # Names of the plugins after each layer.
        self.plugin_names: list[list[str]] = [[] for _ in self.norm_names]
        for plugin in plugins:
            self._add_plugin(plugin['position'], dict(plugin['cfg']))
        self.downsample = None
        if stride != 1 or in_channels != channels:
            pool = [nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)]
            conv_stride = 1 if avg_down else stride
            self.downsample = nn.Sequential(
                *(pool if avg_down else ()),
                build_conv_layer(conv_cfg, in_channels, channels, 1, conv_stride, bias=False),
                build_norm_layer(norm_cfg, channels)[1],
            )
        self.fast_path = build_part(fast_path, channels) if fast_path else None

    @abstractmethod
    def _geometry(self, planes: int, stride: int, dilation: int, style: str) -> list[Layer]:
        """Return the shapes of the convolutions of the branch."""

    def _add_layer(self, conv_cfg: dict | None, norm_cfg: dict, channels: int, to: Layer) -> None:
        """Add the next convolution and its norm, named ``conv1`` and, if a batch norm, ``bn1``."""
        number, halo = len(self.norm_names) + 1, to.dilation * (to.kernel_size // 2)
        place = dict(stride=to.stride, padding=halo, dilation=to.dilation)
        conv = build_conv_layer(
            conv_cfg, channels, to.channels, to.kernel_size, bias=False, **place
        )
        self.add_module(f'conv{number}', conv)
        name, norm = build_norm_layer(norm_cfg, to.channels, postfix=number)
        self.add_module(name, norm)
        self.norm_names.append(name)
        self.halo += halo

    def _add_plugin(self, position: str, cfg: dict) -> None:
        positions = ('after_conv1', 'after_conv2', 'after_conv3')
        if position not in positions:
            raise ValueError(f'plugins must have a position of {positions}, got {position!r}')
        i = positions.index(position)
        postfix, channels = cfg.pop('postfix', ''), self.layers[i][0].out_channels
        name, plugin = build_plugin_layer(cfg, postfix, in_channels=channels)
        if hasattr(self, name):
            raise ValueError(f'plugins of one type must have different postfixes, got {name} twice')
        self.add_module(name, plugin)
        self.plugin_names[i].append(name)

    @property
    def layers(self) -> list[tuple[nn.Module, nn.Module]]:
        """The convolutions of the branch with their norms."""
        names = enumerate(self.norm_names, 1)
        return [(getattr(self, f'conv{i}'), getattr(self, name)) for i, name in names]

    def obstacle(self) -> str | None:
        """Return the type of a part for which the block cannot be evaluated in cells, if any."""
        for conv, norm in self.layers:
            if type(conv) is not nn.Conv2d:
                return type(conv).__name__
            if not isinstance(norm, _BatchNorm) or not norm.track_running_stats:
                return type(norm).__name__
        for name in chain(*self.plugin_names):
            return type(getattr(self, name)).__name__
        return None

    def _forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the block's output (B, C, H', W') for maps (B, C_in, H, W).

        The mask (B, 1, H, W) is 1 where the branch applies and 0 where the fast path does.
        """
        out = self._branch(x)
        if mask is not None:
            mask = mask.to(out.dtype)
            out = out * mask
            if self.fast_path is not None:
                fast = self.fast_path(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
                out = out + fast.to(out.dtype) * (1 - mask)
        out += self._identity(x)
        return self.relu(out)

    def update_cells(self, table: Tensor, cells: Cells) -> None:
        """Apply the block to a table as of ``cell_table``, in place; rows are for its halo."""
        kept = cells.kept
        # Both paths read the table before either writes to it.
        slow = None
        if kept.inner.shape[0] > 0:
            with region('slow path'):
                slow = self._branch_in_cells(table, cells).to(table.dtype)
            with region('gather'):
                slow += table.index_select(0, kept.inner)
        if self.fast_path is not None:
            with region('gather'):
                x = table.index_select(0, cells.dropped)
            with region('fast path'):
                fast = self.relu(self.fast_path(x).to(x.dtype) + x)
            with region('scatter'):
                put_rows(table, cells.dropped, fast)
        if slow is not None:
            with region('scatter'):
                put_rows(table, kept.inner, self.relu(slow))

    def _identity(self, x: Tensor) -> Tensor:
        if self.downsample is None:
            return x
        if not is_plain(self.downsample, nn.Sequential):
            return self.downsample(x)
        *pool, conv, norm = self.downsample
        for layer in pool:
            x = layer(x)
        return conv_norm(x, conv, norm)

    def _branch(self, x: Tensor) -> Tensor:
        """Return the residual (B, C, H', W') of a map."""
        layers = self.layers
        for i, (conv, norm) in enumerate(layers):
            x = conv_norm(x, conv, norm)
            if i < len(layers) - 1:
                x = self.relu(x)
            for name in self.plugin_names[i]:
                x = getattr(self, name)(x.contiguous())
        return x

    @abstractmethod
    def _branch_in_cells(self, table: Tensor, cells: Cells) -> Tensor:
        """Return the residual of the kept cells' positions, (K * g * g, C)."""

    def _fused_conv(self, table: Tensor, cells: Cells, relu: bool) -> Tensor:
        """Apply the first layer everywhere and the second one in kept cells, (K, C, g, g)."""
        first, (conv, norm) = self.layers[:2]
        if not can_fold(conv, norm):
            raise ValueError(
                'conv2 and its norm must be a convolution and a batch norm without hooks or '
                f"adapters with execution 'triton', got {conv} and {norm}"
            )
        x = self.relu(conv_norm(table_map(table, cells.batch, cells.hw), *first))
        # Under autocast the parameters are float32.
        weight, bias = (value.to(x.dtype) for value in fold_norm(conv, norm))
        cell_conv = get_kernel('cell_conv')
        return cell_conv(x, cells.index, cells.size, weight, bias, conv.dilation[0], relu)


class BasicBlock(ResidualBlock):
    """Two 3 x 3 convolutions (He et al., fig. 5 left)."""

    expansion = 1

    def _geometry(self, planes: int, stride: int, dilation: int, style: str) -> list[Layer]:
        return [Layer(planes, 3, stride, dilation), Layer(planes, 3)]

    def _branch_in_cells(self, table: Tensor, cells: Cells) -> Tensor:
        if cells.fused:
            return tile_rows(self._fused_conv(table, cells, relu=False))
        first, second = self.layers
        side, tile = cells.size + 2 * self.halo, cells.kept.tile
        with region('gather'):
            x = take_tiles(table, tile, side)
        margin = self.halo - 1
        x = self.relu(conv_norm(x, *first, halo=margin))
        # The second convolution is padded with zeros, not with what the first gives there.
        inside = tile.view(-1, 1, side, side) < table.shape[0] - 2
        x = x * inside[:, :, margin:-margin, margin:-margin].to(x.dtype)
        return tile_rows(conv_norm(x, *second, halo=1))


class Bottleneck(ResidualBlock):
    """1 x 1, 3 x 3 and 1 x 1 convolution (He et al., fig. 5 right)."""

    expansion = 4

    def _geometry(self, planes: int, stride: int, dilation: int, style: str) -> list[Layer]:
        first, second = (1, stride) if style == 'pytorch' else (stride, 1)
        last = Layer(4 * planes, 1)
        return [Layer(planes, 1, first), Layer(planes, 3, second, dilation), last]

    def _branch_in_cells(self, table: Tensor, cells: Cells) -> Tensor:
        first, second, third = self.layers
        if cells.fused:
            x = self._fused_conv(table, cells, relu=True)
            return tile_rows(conv_norm(x, *third))
        kept = cells.kept
        with region('gather'):
            # As one image of R x 1 positions: R images of one position are several times slower.
            near = table.index_select(0, kept.near).view(1, -1, 1, table.shape[1])
        near = tile_rows(self.relu(conv_norm(near.permute(0, 3, 1, 2), *first)))
        with region('gather'):
            # One more row, of zeros, for the padding of the 3 x 3 convolution.
            near = nn.functional.pad(near, (0, 0, 0, 1))
            x = take_tiles(near, kept.tile_of_near, cells.size + 2 * self.halo)
        x = self.relu(conv_norm(x, *second, halo=self.halo))
        return tile_rows(conv_norm(x, *third))
