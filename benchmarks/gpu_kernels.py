"""The Triton kernels on a CUDA device: are they right, and are they fast.

Each kernel is compared with gathered execution in torch, in the same dtype, and timed against it
and against the dense computation at all locations, at sizes of Swin-S (third stage, 512 x 512) and
of UperNet's fusion convolution.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mmdynsparse.analysis import compare_latency
from mmdynsparse.ops import cell_table, take_tiles
from mmdynsparse.ops.cells import rows_of_cells
from mmdynsparse.ops.kernels import LinearWeights, MlpWeights, get_kernel

# Largest error, relative to the largest value: some roundings of the dtype.
DTYPES = {
    'bf16': (torch.bfloat16, 2e-2),
    'fp16': (torch.float16, 3e-3),
    'fp32': (torch.float32, 1e-4),
}
# One call of a kernel is as short as a launch; a graph of several shows the kernel.
CALLS = 20
RATIOS = (0.7, 0.5, 0.3)


class Case(NamedTuple):
    """One op at one size: the dense computation, and the sparse one in torch and in Triton."""

    name: str
    dense: Callable[[], Tensor]
    torch: Callable[[], Tensor]
    triton: Callable[[], Tensor]


def main(argv: list[str] | None = None) -> None:
    """Check and time all cases, print the table and write it as JSON."""
    args = parse_args(argv)
    dtype, tolerance = DTYPES[args.dtype]
    rows = []
    torch.manual_seed(0)
    # Matrix products have it off by default, as the kernels always have.
    torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad():
        for batch in (1, 8):
            for ratio in RATIOS:
                mlp = mlp_case(batch * 1024, 384, ratio, dtype, 'cuda')
                conv = conv_case(batch, 512, 128, 8, ratio, dtype, 'cuda')
                for case in (mlp, conv):
                    name = f'{case.name}, batch {batch}, keep {ratio}'
                    rows.append(dict(name=name, error=error(case), **latencies(case, args.rounds)))
    result = dict(setting=setting(args), rows=rows)
    report(result)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + '\n')
    wrong = [row['name'] for row in rows if not row['error'] <= tolerance]
    if wrong:
        raise SystemExit(f'error above {tolerance} in: {"; ".join(wrong)}')


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; without CUDA that is an error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--dtype', choices=tuple(DTYPES), default='bf16')
    parser.add_argument('--rounds', type=int, default=30, help='timed rounds of each')
    parser.add_argument('--out', type=Path, help='JSON file for the numbers')
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f'--rounds must be at least 1, got {args.rounds}')
    if not torch.cuda.is_available():
        parser.error('the Triton kernels need a CUDA device, and torch finds none')
    return args


def mlp_case(tokens: int, channels: int, ratio: float, dtype: torch.dtype, device: str) -> Case:
    """MLP of a transformer block with the linear fast path.

    Args:
        tokens: Of the whole batch.
        channels: C; the hidden width is 4 C.
        ratio: Share of the tokens that are kept, in [0, 1].
        dtype: Of tokens and weights.
        device: Where they are.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device) / shape[-1] ** 0.5

    c, h = channels, 4 * channels
    norm = torch.ones(c, dtype=dtype, device=device), normal(c), 1e-5
    mlp = MlpWeights(*norm, normal(h, c), normal(h), normal(c, h), normal(c))
    fast = LinearWeights(*norm, normal(c, c), normal(c))
    x_PC = torch.randn(tokens, c, dtype=dtype, device=device)
    kept_K, dropped_M = split(tokens, ratio, device)

    def slow_path(x: Tensor) -> Tensor:
        x = F.layer_norm(x, (c,), mlp.norm_weight, mlp.norm_bias, mlp.eps)
        return F.linear(F.gelu(F.linear(x, mlp.weight1, mlp.bias1)), mlp.weight2, mlp.bias2)

    def fast_path(x: Tensor) -> Tensor:
        x = F.layer_norm(x, (c,), fast.norm_weight, fast.norm_bias, fast.eps)
        return F.linear(x, fast.weight, fast.bias)

    def gathered() -> Tensor:
        out = torch.empty_like(x_PC)
        for rows, path in ((kept_K, slow_path), (dropped_M, fast_path)):
            x_RC = x_PC.index_select(0, rows)
            out.index_copy_(0, rows, x_RC + path(x_RC))
        return out

    kernel = get_kernel('sparse_mlp')
    return Case(
        f'sparse_mlp {tokens} x {c}',
        dense=lambda: x_PC + slow_path(x_PC),
        torch=gathered,
        triton=lambda: kernel(x_PC, x_PC, kept_K, dropped_M, mlp, fast),
    )


def conv_case(
    batch: int,
    channels: int,
    size: int,
    cell_size: int,
    ratio: float,
    dtype: torch.dtype,
    device: str,
) -> Case:
    """3 x 3 convolution with bias and ReLU at chosen cells.

    Args:
        batch: Images.
        channels: Of input and output.
        size: Height and width of the map in positions.
        cell_size: Side of a cell in positions.
        ratio: Share of the cells that are chosen, in [0, 1].
        dtype: Of map and weights.
        device: Where they are.
    """
    layout = dict(dtype=dtype, device=device)
    x_BCHW = torch.randn(batch, channels, size, size, **layout)
    x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, **layout) / (3 * channels**0.5)
    weight = weight.contiguous(memory_format=torch.channels_last)
    bias = torch.randn(channels, **layout)
    cells_K, _ = split(batch * (-(-size // cell_size)) ** 2, ratio, device)
    kernel = get_kernel('cell_conv')

    def gathered() -> Tensor:
        rows = rows_of_cells(batch, (size, size), cell_size, 1, x_BCHW.device)
        rows = rows.index_select(0, cells_K).flatten()
        tiles = take_tiles(cell_table(x_BCHW), rows, cell_size + 2)
        out = F.conv2d(tiles, weight, bias).relu_()
        return out.contiguous(memory_format=torch.channels_last)

    return Case(
        f'cell_conv {channels} x {size} x {size}',
        dense=lambda: F.conv2d(x_BCHW, weight, bias, padding=1).relu_(),
        torch=gathered,
        triton=lambda: kernel(x_BCHW, cells_K, cell_size, weight, bias, relu=True),
    )


def split(total: int, ratio: float, device: str) -> tuple[Tensor, Tensor]:
    """Return sorted positions of a random share and of the rest."""
    order = torch.randperm(total, device=device)
    count = int(total * ratio)
    return order[:count].sort().values, order[count:].sort().values


def error(case: Case) -> float:
    """Largest difference between torch and Triton, relative to the largest value."""
    expected, got = case.torch().float(), case.triton().float()
    return ((got - expected).abs().max() / expected.abs().max()).item()


def latencies(case: Case, rounds: int) -> dict[str, float]:
    """Median time of one call in ms, of the dense and of both sparse computations."""
    functions = {name: replay_of(getattr(case, name)) for name in ('dense', 'torch', 'triton')}
    times = compare_latency(functions, rounds=rounds)
    return {name: latency.median / CALLS for name, latency in times.items()}


def replay_of(function: Callable[[], Tensor]) -> Callable[[], None]:
    """Capture several calls in a CUDA graph; that fails where a call waits for the device."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            function()
    return graph.replay


def setting(args: argparse.Namespace) -> dict:
    """Describe the device, the versions and the run."""
    import triton

    return dict(
        device=torch.cuda.get_device_name(),
        torch=torch.__version__,
        triton=triton.__version__,
        dtype=args.dtype,
        rounds=args.rounds,
        timing=f'CUDA graph of {CALLS} calls, ms of one call',
    )


def report(result: dict) -> None:
    """Print the setting and the table."""
    for key, value in result['setting'].items():
        print(f'{key:7} {value}')
    columns = ('dense ms', 'torch ms', 'triton ms', 'triton to dense', 'error')
    table = Table('op', *columns, title='kernels')
    for row in result['rows']:
        ratio = row['dense'] / row['triton']
        times = (f'{row[name]:.4f}' for name in ('dense', 'torch', 'triton'))
        table.add_row(row['name'], *times, f'{ratio:.2f} x', f'{row["error"]:.1e}')
    Console(width=120).print(table)


if __name__ == '__main__':
    main()
