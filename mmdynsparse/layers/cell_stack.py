"""A stack of 3 x 3 convolutions that reads and writes the kept cells of a map alone.

Each layer gathers the halo of its tiles from the outputs of the layer before, so nothing is
computed twice; a halo that is as wide as the stack is deep is gathered once, but doubles the work
in cells of 8 x 8 positions. From the second layer on, what lies in dropped cells reads as zero,
like the padding of the map. Dimension letters: B images, K kept cells of g x g positions,
C channels, D groups of channels, G = g + 2.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from torch import Tensor, nn

from ..ops import region, row_tiles, tile_rows
from .cell_conv import KeptCells
from .conv_module import conv_module
from .conv_norm import convolve


class Branch(NamedTuple):
    """Convolutions that follow one another, and those that predict from the last one's output.

    Attributes:
        convs: 3 x 3 convolutions: ConvModules, or plain ones, which a ReLU follows.
        predictors: Convolutions of 3 x 3 or 1 x 1.
    """

    convs: Sequence[nn.Module]
    predictors: Sequence[nn.Module]


class Inside(NamedTuple):
    """Which positions statistics of tiles, or of whole maps, are made of.

    Attributes:
        mask: (K, 1, g, g), 1 at these positions and 0 elsewhere.
        images: (B, K), 1 where a tile is of an image and 0 elsewhere.
    """

    mask: Tensor
    images: Tensor


def run_everywhere(branch: Branch, x_BCHW: Tensor, mask_B1HW: Tensor | None = None) -> list[Tensor]:
    """Compute the predictions of a branch on a map.

    Args:
        branch: The branch.
        x_BCHW: The map.
        mask_B1HW: 1 at kept and 0 at dropped positions; there, layers return zero, and group norms
            do not see them. Defaults to None, the dense branch.

    Returns:
        (B, C_i, H, W) of each predictor; with a mask, of no meaning at dropped positions.
    """
    inside = None
    if mask_B1HW is not None:
        images = torch.eye(x_BCHW.shape[0], device=x_BCHW.device)
        inside = Inside(mask_B1HW.detach(), images)
    for conv in branch.convs:
        x_BCHW = _layer(conv, x_BCHW, inside, halo=0)
        if mask_B1HW is not None:
            x_BCHW = x_BCHW * mask_B1HW.to(x_BCHW.dtype)
    return [convolve(x_BCHW, predictor) for predictor in branch.predictors]


def run_in_cells(branch: Branch, x_BCHW: Tensor, cells: KeptCells) -> list[Tensor]:
    """Compute the predictions of a branch in kept cells, as :func:`run_everywhere` with their mask.

    Returns:
        (K * g * g, C_i) of each predictor, the rows in the order of ``cells.rows.inner``.
    """
    inside = None
    if any(isinstance(conv, ConvModule) and conv.with_norm for conv in branch.convs):
        inside = _inside(x_BCHW, cells)
    halo = _halo_rows(x_BCHW, cells)
    wide = cells.tiles_of_map(x_BCHW)
    for conv in branch.convs:
        with region('slow path'):
            tiles = _layer(conv, wide, inside, halo=1)
        with region('gather'):
            rows = F.pad(tile_rows(tiles), (0, 0, 0, 1)).index_select(0, halo)
            wide = row_tiles(rows, cells.size + 2)
    with region('slow path'):
        return [tile_rows(_predict(conv, wide)) for conv in branch.predictors]


def check_branch(branch: Branch) -> None:
    """Raise a ValueError if a layer of a branch cannot run in cells."""
    for module in branch.convs:
        conv, norm = module, None
        if isinstance(module, ConvModule):
            conv, norm = module.conv, module.norm if module.with_norm else None
        plain = type(conv) is nn.Conv2d and _geometry(conv) == ((3, 3), (1, 1), (1, 1), (1, 1))
        if not plain or not (norm is None or type(norm) is nn.GroupNorm):
            raise ValueError(
                'conv_cfg and norm_cfg must be a plain 3 x 3 convolution and a group norm or None '
                f'in a sparse head, got {conv} and {norm}'
            )
    for conv in branch.predictors:
        geometry = _geometry(conv) if isinstance(conv, nn.Conv2d) else None
        if geometry not in (((3, 3), (1, 1), (1, 1), (1, 1)), ((1, 1), (0, 0), (1, 1), (1, 1))):
            raise ValueError(
                'the predictions of a sparse head must come from convolutions of 3 x 3 or 1 x 1, '
                f'got {conv}'
            )


def _geometry(conv: nn.Conv2d) -> tuple:
    return conv.kernel_size, conv.padding, conv.stride, conv.dilation


def _layer(module: nn.Module, x: Tensor, inside: Inside | None, halo: int) -> Tensor:
    if not isinstance(module, ConvModule):
        return F.relu(convolve(x, module, halo))
    if inside is None or not module.with_norm:
        return conv_module(module, x, padding=0 if halo else None)
    x = kept_group_norm(convolve(x, module.conv, halo), module.norm, inside)
    return module.activate(x) if module.with_activation else x


def _predict(conv: nn.Module, wide: Tensor) -> Tensor:
    if conv.padding[0] == 0:
        return conv(wide[:, :, 1:-1, 1:-1])
    return convolve(wide, conv, halo=1)


def kept_group_norm(x_KCgg: Tensor, norm: nn.GroupNorm, inside: Inside) -> Tensor:
    """Apply a group norm whose statistics are those of some positions of each image.

    Args:
        x_KCgg: Tiles, or whole maps, for which K is B.
        norm: The norm.
        inside: Which positions count.

    Returns:
        (K, C, g, g), float32 under autocast, as the norm's own.
    """
    with torch.autocast(x_KCgg.device.type, enabled=False):
        x = x_KCgg.to(norm.weight.dtype).unflatten(1, (norm.num_groups, -1))
        images, mask = inside.images.to(x.dtype), inside.mask.to(x.dtype).unsqueeze(1)
        count_B1 = images @ mask.sum((2, 3, 4)) * x.shape[2]
        mean_BD = images @ (x * mask).sum((2, 3, 4)) / count_B1.clamp(min=1)
        mean_KD = images.t() @ mean_BD
        squares = (x - mean_KD[..., None, None, None]).square()
        var_BD = images @ (squares * mask).sum((2, 3, 4)) / count_B1.clamp(min=1)
        scale_KD = images.t() @ (var_BD + norm.eps).rsqrt()
        per_group = norm.num_channels // norm.num_groups
        scale_KC = scale_KD.repeat_interleave(per_group, 1) * norm.weight
        shift_KC = norm.bias - mean_KD.repeat_interleave(per_group, 1) * scale_KC
        x = x.flatten(1, 2)
        return torch.addcmul(shift_KC[..., None, None], x, scale_KC[..., None, None])


def _inside(x_BCHW: Tensor, cells: KeptCells) -> Inside:
    batch, of_image = x_BCHW.shape[0], x_BCHW[0, 0].numel()
    rows_Kgg = cells.rows.inner.view(-1, 1, cells.size, cells.size)
    image_K = rows_Kgg[:, 0, 0, 0] // of_image  # the first position is within the map
    number_B1 = torch.arange(batch, device=x_BCHW.device).unsqueeze(1)
    return Inside((rows_Kgg < batch * of_image).float(), (image_K == number_B1).float())


def _halo_rows(x_BCHW: Tensor, cells: KeptCells) -> Tensor:
    """Return what each position of the tiles is among the kept rows, (K * G * G,) int64.

    It is the number of these rows for a position that is not kept.
    """
    positions, kept = x_BCHW[:, 0].numel(), cells.rows.inner
    slots = torch.full((positions + 2,), kept.shape[0], device=kept.device)
    slots = slots.index_copy(0, kept, torch.arange(kept.shape[0], device=kept.device))
    # A position P reads as zero; P + 1 is written by cells that reach beyond the map, and not read.
    return slots.index_select(0, cells.rows.tile)
