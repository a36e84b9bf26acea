"""Bottlenecks in kept cells beside the same ones on the whole map, by cell and keep ratio."""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from mmdynsparse.analysis import compare_latency
from mmdynsparse.analysis.environment import environment
from mmdynsparse.models.backbones.resnet import in_cells
from mmdynsparse.models.backbones.resnet_blocks import Bottleneck
from mmdynsparse.ops import cell_grid, plan, select_decision

STAGES = {2: (128, 8), 3: (256, 16), 4: (512, 32)}
CELLS = (4, 8, 16)
RATIOS = (0.3, 0.5, 0.7, 0.8, 0.9)


def main() -> None:
    """Time every stage, print the table and write it as JSON."""
    args = parse_args()
    torch.manual_seed(0)
    rows = [row for stage in STAGES for row in measure(stage, args.size, args.blocks, args.rounds)]
    table = Table('stage', 'cell', *(f'keep {r}' for r in RATIOS), title='speed-up over dense')
    for row in rows:
        table.add_row(*(str(row[k]) for k in ('stage', 'cell')), *row['speed_up'].values())
    Console().print(table)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        setting = environment(torch.device('cpu')) | dict(size=args.size, blocks=args.blocks)
        result = dict(setting=setting, rows=rows)
        args.out.write_text(json.dumps(result, indent=2) + '\n')


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--size', type=int, default=512, help='height and width in px')
    parser.add_argument('--blocks', type=int, default=3, help='bottlenecks that share a decision')
    parser.add_argument('--rounds', type=int, default=10, help='timed calls')
    parser.add_argument('--out', type=Path, help='JSON file for the numbers')
    args = parser.parse_args()
    for name, least in dict(size=64, blocks=1, rounds=1).items():
        if getattr(args, name) < least:
            parser.error(f'--{name} must be at least {least}, got {getattr(args, name)}')
    return args


def measure(stage: int, size: int, count: int, rounds: int) -> list[dict]:
    """Time the bottlenecks of one stage for every cell and keep ratio; cells are random."""
    planes, stride = STAGES[stage]
    side = size // stride
    x = torch.randn(1, 4 * planes, side, side).relu().contiguous(memory_format=torch.channels_last)
    blocks = [bottleneck(planes) for _ in range(count)]
    calls = {'dense': partial(run_dense, x, blocks)}
    for cell in CELLS:
        grid = cell_grid((side, side), cell)
        log_probs = torch.randn(1, grid[0] * grid[1], 2).log_softmax(-1)
        for ratio in RATIOS:
            decision = select_decision(log_probs, (side, side), ratio, cell_size=cell)
            how = plan(decision, 'gather', learns=False, of_cells=True)
            if grid[0] * grid[1] * ratio >= 1:
                calls[cell, ratio] = partial(in_cells, x, blocks, how)
    latency = compare_latency(calls, rounds)
    dense = latency.pop('dense').median
    return [
        dict(
            stage=stage,
            cell=cell,
            dense_ms=dense,
            speed_up={
                str(r): f'{dense / latency[cell, r].median:.2f}' if (cell, r) in latency else ''
                for r in RATIOS
            },
        )
        for cell in CELLS
    ]


def bottleneck(planes: int) -> Bottleneck:
    """Build a bottleneck that keeps the size of its map, in eval mode."""
    args = dict(style='pytorch', avg_down=False, with_cp=False, fast_path=None)
    return Bottleneck(4 * planes, planes, 1, 1, norm_cfg=dict(type='BN'), **args).eval()


def run_dense(x: torch.Tensor, blocks: Sequence[nn.Module]) -> torch.Tensor:
    """Run the blocks on the whole map."""
    for block in blocks:
        x = block(x)
    return x


if __name__ == '__main__':
    main()
