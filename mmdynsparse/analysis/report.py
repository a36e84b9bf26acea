"""Tables and plots of what :mod:`mmdynsparse.analysis.benchmark` measured."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

WIDTH = 160  # characters that the widest table needs


def write_json(result: Mapping, path: Path) -> None:
    """Write a result and create the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + '\n')


def print_setting(setting: Mapping) -> None:
    """Print one line for each entry."""
    width = max(map(len, setting))
    for key, value in setting.items():
        print(f'{key:{width}}  {value}')


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; without a terminal its lines are as long as they have to be."""
    table = Table(title=title)
    for i, name in enumerate(header):
        table.add_column(name, justify='left' if i == 0 else 'right')
    for row in rows:
        table.add_row(*row)
    console = Console()
    Console(width=max(console.width, WIDTH)).print(table)


def latency_table(rows: Sequence[Mapping]) -> None:
    """Print latency, multiply-adds and memory of the rows of a benchmark."""
    found = ('detections',) if any('detections' in row for row in rows) else ()
    header = ('part', 'batch', 'size', 'model', *found, 'GMACs', 'median ms', 'p10', 'p90')
    cells = []
    for row in rows:
        setting = (row['part'], str(row['batch']), row['size'], name(row))
        setting += tuple(f'{row[key]:g}' if key in row else '' for key in found)
        costs = (f'{row[key]:.2f}' for key in ('gmacs', 'median', 'p10', 'p90'))
        ideal, peak = f'{row["ideal"]:.2f} x', f'{row["peak_mib"]:.1f}'
        cells.append((*setting, *costs, verdict(row), ideal, peak))
    print_table('latency', (*header, 'speed-up', 'by GMACs', 'peak MiB'), cells)


def breakdown_tables(rows: Sequence[Mapping]) -> None:
    """Print where the time of the backbones, and of the whole models, goes, in ms."""
    groups = defaultdict(list)
    for row in rows:
        if 'breakdown' in row:
            groups[row['part']].append(row)
    for part, group in groups.items():
        columns = list(dict.fromkeys(key for row in group for key in row['breakdown']))
        cells = []
        for row in group:
            times = (f'{row["breakdown"].get(column, 0.0):.2f}' for column in columns)
            cells.append((name(row), str(row['batch']), row['size'], *times))
        print_table('breakdown (ms, eager, profiled)', (part, 'batch', 'size', *columns), cells)


def name(row: Mapping) -> str:
    """Name the variant of a row: dense, or sparse with its keep ratios."""
    ratios = row['keep_ratios']
    if len(ratios) > 3 and len(set(ratios)) == 1:
        return f'{row["model"]} {len(ratios)} x {ratios[0]:g}'
    return ' '.join((row['model'], *(f'{ratio:g}' for ratio in ratios)))


def verdict(row: Mapping) -> str:
    """Say how much faster than dense a row is, and that it is slower where it is."""
    if row['model'] == 'dense':
        return '1'
    return f'{row["speed_up"]:.2f} x' + (', slower' if row['speed_up'] < 1 else '')


def plot_latency(rows: Sequence[Mapping], path: Path, title: str) -> None:
    """Plot latency against the mean keep ratio, one panel for each part, batch and size.

    The ideal line is the dense latency times the share of the dense multiply-adds.
    """
    panels = defaultdict(list)
    for row in rows:
        panels[row['part'], row['batch'], row['size']].append(row)
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.6 * lines), layout='constrained')
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for ax, ((part, batch, size), group) in zip(axes, panels.items(), strict=False):
        _plot_panel(ax, group)
        ax.set_title(f'{part}, batch {batch}, {size} px', fontsize=10)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _plot_panel(ax: object, rows: Sequence[Mapping]) -> None:
    dense, *sparse = rows
    sparse = sorted(sparse, key=_mean_ratio)
    ratios = [_mean_ratio(row) for row in sparse]
    median, p10, p90, ideal = (
        np.array([row[key] for row in sparse]) for key in ('median', 'p10', 'p90', 'ideal')
    )
    ax.axhline(dense['median'], color='black', label='dense')
    spread = (median - p10, p90 - median)
    ax.errorbar(ratios, median, spread, marker='o', capsize=3, label='sparse, p10 to p90')
    ax.plot(
        ratios, dense['median'] / ideal, '--', marker='.', color='gray', label='ideal, by GMACs'
    )
    ax.set_ylim(0, 1.1 * max(row['p90'] for row in rows))
    ax.set_xlabel('mean keep ratio')
    ax.set_ylabel('ms')
    ax.legend(fontsize=8)


def _mean_ratio(row: Mapping) -> float:
    return float(np.mean(row['keep_ratios'] or 1.0))
