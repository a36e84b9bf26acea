"""Sparse FFNs beside the same ones on all locations, by stage of Swin, batch and keep ratio."""

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mmdynsparse.analysis import breakdown, compare_latency, count_macs
from mmdynsparse.analysis.environment import environment
from mmdynsparse.layers import FFN, LinearFastPath, LocalGlobalPredictor
from mmdynsparse.ops import DENSE, Decision, Plan, plan, region, select_decision, two_paths

# Channels and side of the map of each stage of Swin-T and Swin-S at 512 x 512 px.
STAGES = {1: (96, 128), 2: (192, 64), 3: (384, 32), 4: (768, 16)}
RATIOS = (0.95, 0.9, 0.7, 0.5, 0.3)
# The third stage of Swin-S at 0.7/0.5/0.3: sparse blocks that follow each predictor.
SWIN_S = {0.7: 2, 0.5: 2, 0.3: 12}
MOVING = ('selection', 'gather', 'scatter')
COLUMNS = ('stage', 'batch', 'keep', 'fast path', 'dense ms', 'masked ms', 'gathered ms')
COLUMNS += ('MACs saved', 'efficiency', 'moving rows')


class Ffn(nn.Module):
    """The FFN part of a Swin block.

    Args:
        channels: Channels C.
        fast_path: Whether dropped locations have a fast path.
    """

    def __init__(self, channels: int, fast_path: bool) -> None:
        super().__init__()
        self.norm2 = nn.LayerNorm(channels)
        self.ffn = FFN(channels, 4 * channels, dict(type='GELU'))
        self.fast_path = LinearFastPath(channels) if fast_path else None

    def forward(self, x: Tensor, how: Plan) -> Tensor:
        """Return the updated tokens (B, N, C)."""
        return two_paths(x, x, self._slow_path, self.fast_path, how, nn.Identity())

    def _slow_path(self, x: Tensor) -> Tensor:
        return self.ffn(self.norm2(x))


def main() -> None:
    """Time every stage and batch, print the table and write it as JSON."""
    args = parse_args()
    torch.manual_seed(0)
    rows = []
    for batch in args.batch_sizes:
        for stage in args.stages:
            rows += measure(stage, *STAGES[stage], batch, args.blocks, args.rounds)
        rows.append(measure_swin_s(*STAGES[3], batch, args.rounds))
    table = Table(*COLUMNS, title='executed multiply-adds and time of FFNs, for one block')
    for row in rows:
        table.add_row(*cells_of(row))
    Console().print(table)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        setting = environment(torch.device('cpu')) | dict(blocks=args.blocks, rounds=args.rounds)
        setting['malloc'] = {k: v for k, v in os.environ.items() if k.startswith('MALLOC_')}
        args.out.write_text(json.dumps(dict(setting=setting, rows=rows), indent=2) + '\n')


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--stages', type=int, nargs='+', choices=STAGES, default=list(STAGES))
    parser.add_argument('--batch-sizes', type=int, nargs='+', default=[1, 8], help='images')
    parser.add_argument('--blocks', type=int, default=2, help='FFNs that share a decision')
    parser.add_argument('--rounds', type=int, default=10, help='timed calls')
    parser.add_argument('--out', type=Path, help='JSON file for the numbers')
    args = parser.parse_args()
    for name, value in dict(
        batch_sizes=min(args.batch_sizes), blocks=args.blocks, rounds=args.rounds
    ).items():
        if value < 1:
            parser.error(f'--{name.replace("_", "-")} must be at least 1, got {value}')
    return args


def measure(
    stage: int, channels: int, side: int, batch: int, count: int, rounds: int
) -> list[dict]:
    """Time FFNs that share a given decision, with and without a fast path."""
    x = torch.randn(batch, side * side, channels)
    decisions = {ratio: random_decision(x, side, ratio) for ratio in RATIOS}
    blocks = {fast: ffns(channels, count, fast) for fast in (True, False)}
    calls = {'dense': partial(run, x, blocks[True], DENSE)}
    for fast, chain in blocks.items():
        # Masked execution computes everything, whatever is kept.
        masked = plan(decisions[RATIOS[0]], 'masked', learns=False)
        calls[fast, 'masked'] = partial(run, x, chain, masked)
        for ratio, decision in decisions.items():
            calls[fast, ratio] = partial(run, x, chain, plan(decision, 'gather', learns=False))
    times = {name: value.median for name, value in compare_latency(calls, rounds).items()}
    return [
        dict(
            stage=stage,
            batch=batch,
            keep=ratio,
            fast_path=fast,
            masked_ms=times[fast, 'masked'] / count,
            **compare(calls, times, (fast, ratio), count, blocks[fast]),
        )
        for fast in blocks
        for ratio in RATIOS
    ]


def measure_swin_s(channels: int, side: int, batch: int, rounds: int) -> dict:
    """Time the sparse FFNs of the third stage of Swin-S with its predictors and selection."""
    x = torch.randn(batch, side * side, channels)
    count = sum(SWIN_S.values())
    blocks = ffns(channels, count, fast_path=True)
    predictors = nn.ModuleList(LocalGlobalPredictor(channels) for _ in SWIN_S).eval()
    calls = {
        'dense': partial(run, x, blocks, DENSE),
        'sparse': partial(run_stage, x, blocks, predictors, side),
    }
    times = {name: value.median for name, value in compare_latency(calls, rounds).items()}
    return dict(
        stage='3, whole',
        batch=batch,
        keep='/'.join(str(ratio) for ratio in SWIN_S),
        fast_path=True,
        **compare(calls, times, 'sparse', count, blocks),
    )


def compare(
    calls: Mapping[object, Callable],
    times: Mapping[object, float],
    name: object,
    count: int,
    blocks: nn.Module,
) -> dict:
    """Compare a sparse call with the dense one.

    Returns:
        Times in ms and multiply-adds of one block; the share of the multiply-adds that is saved;
        the efficiency, which is the share of the time that is saved, divided by it; and the share
        of the sparse time in selection, gather and scatter.
    """
    dense_ms, sparse_ms = times['dense'], times[name]
    dense_macs, sparse_macs = count_macs(calls['dense']), count_macs(calls[name])
    saved = 1 - sparse_macs / dense_macs
    parts = breakdown(blocks, calls[name], torch.device('cpu'), runs=3)
    return dict(
        dense_ms=dense_ms / count,
        gathered_ms=sparse_ms / count,
        dense_macs=dense_macs // count,
        gathered_macs=sparse_macs // count,
        macs_saved=saved,
        efficiency=(1 - sparse_ms / dense_ms) / saved,
        moving=sum(parts[part] for part in MOVING) / parts['whole'],
        parts_ms={part: ms / count for part, ms in parts.items()},
    )


def cells_of(row: Mapping) -> list[str]:
    """Format a row of the table."""
    masked = f'{row["masked_ms"]:.2f}' if 'masked_ms' in row else ''
    return [
        *(str(row[k]) for k in ('stage', 'batch', 'keep')),
        'yes' if row['fast_path'] else 'no',
        f'{row["dense_ms"]:.2f}',
        masked,
        f'{row["gathered_ms"]:.2f}',
        *(f'{100 * row[k]:.1f}%' for k in ('macs_saved', 'efficiency', 'moving')),
    ]


def random_decision(x: Tensor, side: int, ratio: float) -> Decision:
    """Keep random locations, the same number in each image."""
    log_probs = torch.randn(*x.shape[:2], 2).log_softmax(-1)
    return select_decision(log_probs, (side, side), ratio)


def ffns(channels: int, count: int, fast_path: bool) -> nn.ModuleList:
    """Build FFNs with weights of their own, in eval mode."""
    return nn.ModuleList(Ffn(channels, fast_path) for _ in range(count)).eval()


def run(x: Tensor, blocks: Sequence[nn.Module], how: Plan) -> Tensor:
    """Run the blocks one after the other."""
    for block in blocks:
        x = block(x, how)
    return x


def run_stage(
    x: Tensor, blocks: nn.ModuleList, predictors: Sequence[nn.Module], side: int
) -> Tensor:
    """Run blocks and predictors as the third stage of Swin-S does, without attention."""
    rest = iter(blocks)
    for predictor, (ratio, count) in zip(predictors, SWIN_S.items(), strict=True):
        with region('predictor'):
            log_probs = predictor(x)
        decision = select_decision(log_probs, (side, side), ratio)
        how = plan(decision, 'gather', learns=False)
        x = run(x, [next(rest) for _ in range(count)], how)
    return x


if __name__ == '__main__':
    main()
