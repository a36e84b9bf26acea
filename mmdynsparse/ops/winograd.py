"""3 x 3 convolutions with a quarter of the multiplications, for inference on a CPU.

Source: Lavin and Gray, *Fast Algorithms for Convolutional Neural Networks* (CVPR 2016,
arXiv 1509.09308), F(4 x 4, 3 x 3): kernels and windows of 6 x 6 inputs are evaluated, as
polynomials, at six points in each direction, multiplied there, and interpolated to 4 x 4 outputs.
The points are our choice.
Dimension letters: B images, C input and O output channels, N windows.
"""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from .caching import cached
from .rows import is_exporting, plain_float32

_POINTS = (0, 5 / 8, -5 / 8, 3 / 2, -3 / 2)  # and infinity
_OUT, _IN = 4, 6  # outputs and inputs of a window, in each direction
# Below these numbers of channels, and of windows in all, transforming costs about what it saves
# (benchmarks/convolutions.py). An exported kernel is transformed once, but its runtime convolves
# few channels faster.
_EAGER, _EXPORTED = (96, 96), (256, 64)
_USED = 0.8  # share of the windows' outputs that must be within the map
_CHUNK = 2**22  # numbers of an intermediate result: larger ones cost page faults


def _powers(count: int) -> Tensor:
    """Powers 0 to count - 1 of the points; of the one at infinity only the last counts."""
    points = torch.tensor(_POINTS, dtype=torch.float64).view(-1, 1)
    infinity = F.one_hot(torch.tensor([count - 1]), count).double()
    return torch.cat((points ** torch.arange(count), infinity))


# For kernels (36, 9), windows (36, 36) and outputs (16, 36).
_SPREAD, _EVALUATE, _INTERPOLATE = (
    torch.kron(matrix, matrix).float()
    for matrix in (_powers(3), torch.linalg.inv(_powers(_IN)).T, _powers(_OUT).T)
)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """Do what ``torch.nn.functional.conv2d`` does, on a CPU in the form that is fastest.

    Large 3 x 3 convolutions in float32 take Winograd's form where nothing needs a gradient, and in
    models that are exported. The result is then channels last in memory, and its error is about
    1e-6 of the outputs' standard deviation. Multiply-adds are counted for the direct form.
    """
    geometry = [_pair(value) for value in (stride, padding, dilation)]
    if groups == 1 and _pays(x, weight, *geometry):
        return _winograd(x, weight, bias, geometry[1][0])
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _pays(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> bool:
    exported = is_exporting() and x.device.type == 'cpu' and x.dtype == torch.float32
    if not (exported or plain_float32(x)):
        return False
    if weight.shape[2:] != (3, 3) or stride != (1, 1) or dilation != (1, 1):
        return False
    channels, least = _EXPORTED if exported else _EAGER
    if padding[0] != padding[1] or min(weight.shape[:2]) < channels:
        return False
    sides = [side + 2 * padding[0] - 2 for side in x.shape[2:]]
    windows = prod(_windows(side) for side in sides)
    used = min(sides) > 0 and prod(sides) >= _USED * windows * _OUT**2
    return used and _at_least(x.shape[0] * windows, least)


def _at_least(count: int | torch.SymInt, least: int) -> bool:
    """Whether a number is as large; one that depends on an exported batch must not become fixed."""
    if isinstance(count, int):
        return count >= least
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # takes half a second

    return statically_known_true(count >= least)


def _windows(outputs: int) -> int:
    return -(-outputs // _OUT)


def _winograd(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """Return the convolution (B, O, H', W') of maps (B, C, H, W), channels last in memory."""
    (batch, channels, h, w), outs = x.shape, weight.shape[0]
    out_h, out_w = h + 2 * padding - 2, w + 2 * padding - 2
    rows, columns = _windows(out_h), _windows(out_w)
    height, width = rows * _OUT + 2, columns * _OUT + 2
    if (height, width) != (h, w):
        x = F.pad(x, (padding, width - w - padding, padding, height - h - padding))
    table = x.permute(0, 2, 3, 1).reshape(-1, channels)
    kernels = (_SPREAD @ weight.reshape(-1, 9).T).view(_IN**2, outs, channels).mT
    windows = _rows_of_windows(batch, height, width, x.device).unflatten(1, (-1, columns))
    if is_exporting():
        out = _outputs(table, windows, kernels, bias)
    else:
        at_once = max(1, _CHUNK // (windows[:, 0].numel() * channels))
        out = x.new_empty(batch * rows, _OUT, columns, _OUT, outs)
        for place, part in zip(out.split(at_once), windows.split(at_once, dim=1), strict=True):
            place.copy_(_outputs(table, part, kernels, bias))
    out = out.reshape(batch, rows * _OUT, columns * _OUT, outs)
    out = out[:, :out_h, :out_w].permute(0, 3, 1, 2)
    return out.contiguous(memory_format=torch.channels_last)


def _outputs(table: Tensor, windows: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
    """Return what rows of windows (36, R, N) give, (R, 4, N, 4, O)."""
    (_, rows, columns), (_, channels, outs) = windows.shape, kernels.shape
    values = table.index_select(0, windows.flatten()).view(_IN**2, -1)
    values = (_EVALUATE @ values).view(_IN**2, -1, channels)
    values = _INTERPOLATE @ (values @ kernels).flatten(1)
    values = values.view(_OUT, _OUT, rows, columns, outs)
    return (values if bias is None else values + bias).permute(2, 0, 3, 1, 4)


@cached
def _rows_of_windows(batch: int, height: int, width: int, device: torch.device) -> Tensor:
    """Row of every position of every window in the table of the maps, (36, N) int64."""
    side = torch.arange(_IN, device=device)
    ys = torch.arange(0, height - 2, _OUT, device=device).view(-1, 1)
    xs = torch.arange(0, width - 2, _OUT, device=device)
    images = torch.arange(batch, device=device).view(-1, 1, 1) * (height * width)
    inside = (side.view(-1, 1) * width + side).view(-1, 1)
    return inside + (images + ys * width + xs).view(1, -1)
