"""3 x 3 convolutions in Winograd's form beside the direct one.

    python benchmarks/convolutions.py [--out FILE.json]

Maps and tiles of kept cells of the sizes that the models have, with their errors against float64.
Decides what ``mmdynsparse.ops.conv2d`` transforms.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from mmdynsparse.analysis.environment import environment
from mmdynsparse.analysis.latency import compare_latency
from mmdynsparse.analysis.report import print_table, write_json
from mmdynsparse.ops.winograd import _winograd

# Channels in and out, batch, height and width, padding.
SHAPES = (
    (512, 512, 1, 64, 64, 1),
    (512, 512, 76, 10, 10, 0),
    (512, 512, 1, 32, 32, 1),
    (512, 512, 1, 16, 16, 1),
    (2816, 512, 1, 16, 16, 1),
    (256, 256, 1, 200, 320, 1),
    (256, 256, 400, 10, 10, 0),
    (256, 256, 100, 14, 14, 1),
    (256, 256, 1, 50, 80, 1),
    (256, 256, 1, 25, 40, 1),
    (256, 256, 1, 13, 20, 1),
    (128, 128, 1, 64, 64, 1),
    (128, 128, 60, 10, 10, 0),
    (96, 96, 1, 64, 64, 1),
    (64, 64, 1, 128, 128, 1),
)


def measure(channels: int, outs: int, batch: int, h: int, w: int, padding: int) -> dict:
    """Time both forms of one convolution, and tell how far each is from float64."""
    torch.manual_seed(0)
    x = torch.randn(batch, channels, h, w).relu_().to(memory_format=torch.channels_last)
    weight = torch.randn(outs, channels, 3, 3) / (9 * channels) ** 0.5
    forms = {
        'direct': partial(F.conv2d, x, weight, padding=padding),
        'winograd': partial(_winograd, x, weight, None, padding),
    }
    latencies = compare_latency(forms, rounds=10, warmup=2)
    exact = F.conv2d(x[:1].double(), weight.double(), padding=padding)
    errors = {name: (form()[:1] - exact).std() / exact.std() for name, form in forms.items()}
    ms = {name: latency.median for name, latency in latencies.items()}
    return dict(
        shape=f'{channels} -> {outs}, {batch} x {h} x {w}, padding {padding}',
        **{f'{name}_ms': value for name, value in ms.items()},
        speed_up=ms['direct'] / ms['winograd'],
        **{f'{name}_error': value.item() for name, value in errors.items()},
    )


def main() -> None:
    """Print a row for each shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=Path)
    out = parser.parse_args().out
    with torch.no_grad():
        rows = [measure(*shape) for shape in SHAPES]
    header = ('convolution', 'direct ms', 'winograd ms', 'speed-up', 'error', 'winograd error')
    cells = [
        (
            row['shape'],
            f'{row["direct_ms"]:.1f}',
            f'{row["winograd_ms"]:.1f}',
            f'{row["speed_up"]:.2f} x',
            f'{row["direct_error"]:.0e}',
            f'{row["winograd_error"]:.0e}',
        )
        for row in rows
    ]
    print_table('3 x 3 convolutions, float32, channels last', header, cells)
    if out:
        write_json(dict(setting=environment(torch.device('cpu')), rows=rows), out)


if __name__ == '__main__':
    main()
