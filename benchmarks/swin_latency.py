"""Latency of the sparse Swin backbone beside mmseg's dense one on the CPU."""

import argparse
import json
import platform
from pathlib import Path

import mmengine
import mmseg
import torch
from mmseg.models.backbones import SwinTransformer
from rich.console import Console
from rich.table import Table

from mmdynsparse.analysis import compare_latency, count_macs
from mmdynsparse.models import SparseSwinTransformer

ARCHS = dict(tiny=(2, 2, 6, 2), small=(2, 2, 18, 2))
KEEP_RATIOS = (1.0, 0.7)


def main() -> None:
    """Time all backbones alternately in one run, print the table and write it as JSON."""
    args = parse_args()
    torch.manual_seed(0)
    x = torch.randn(args.batch, 3, args.size, args.size)
    backbones = build_backbones(ARCHS[args.arch])
    calls = {name: (lambda model=model: model(x)) for name, model in backbones.items()}
    latencies = compare_latency(calls, rounds=args.rounds)
    dense = latencies['dense'].median
    rows = [
        dict(
            name=name,
            gmacs=count_macs(calls[name]) / 1e9,
            **latency._asdict(),
            ratio=dense / latency.median,
        )
        for name, latency in latencies.items()
    ]
    result = dict(setting=setting(args), rows=rows)
    report(result)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + '\n')


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--arch', choices=tuple(ARCHS), default='small', help='Swin-T or Swin-S')
    parser.add_argument('--size', type=int, default=512, help='height and width in px')
    parser.add_argument('--batch', type=int, default=1, help='images per call')
    parser.add_argument('--rounds', type=int, default=30, help='timed calls of each backbone')
    parser.add_argument('--out', type=Path, help='JSON file for the numbers')
    args = parser.parse_args()
    for name in ('size', 'batch', 'rounds'):
        if getattr(args, name) < 1:
            parser.error(f'--{name} must be at least 1, got {getattr(args, name)}')
    return args


def build_backbones(depths: tuple[int, ...]) -> dict[str, torch.nn.Module]:
    """Build the dense backbone and a sparse one per keep ratio, all with the same weights."""
    dense = SwinTransformer(depths=depths)
    dense.eval()
    backbones = {'dense': dense}
    predictors = {}
    for ratio in KEEP_RATIOS:
        sparse = SparseSwinTransformer(depths=depths, sparsity=dict(keep_ratio=ratio))
        sparse.load_state_dict({**dense.state_dict(), **predictors}, strict=False)
        predictors = {k: v for k, v in sparse.state_dict().items() if k not in dense.state_dict()}
        sparse.eval()
        backbones[f'sparse, keep ratio {ratio}'] = sparse
    return backbones


def setting(args: argparse.Namespace) -> dict:
    """Describe the machine, the versions and the input of this run."""
    return dict(
        device=cpu_name(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        mmengine=mmengine.__version__,
        mmseg=mmseg.__version__,
        arch=f'Swin {args.arch}',
        input=f'{args.batch} x 3 x {args.size} x {args.size}, float32',
        rounds=args.rounds,
    )


def cpu_name() -> str:
    """Return the model name of the CPU and the instruction set that torch uses."""
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    name = names[0] if names else platform.processor() or platform.machine()
    return f'{name}, {torch.backends.cpu.get_cpu_capability()}'


def report(result: dict) -> None:
    """Print the setting and the table."""
    for key, value in result['setting'].items():
        print(f'{key:9} {value}')
    table = Table('backbone', 'GMACs', 'median ms', 'p10', 'p90', 'speed-up', title='latency')
    for row in result['rows']:
        numbers = (row['gmacs'], row['median'], row['p10'], row['p90'], row['ratio'])
        table.add_row(row['name'], *(f'{number:.2f}' for number in numbers))
    Console().print(table)


if __name__ == '__main__':
    main()
