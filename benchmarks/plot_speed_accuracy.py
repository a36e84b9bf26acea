"""Draws accuracy against speed of the study on CamVid, for README and docs.

    python benchmarks/plot_speed_accuracy.py --out docs/images/speed-accuracy.png

Reads ``benchmarks/results/study_upernet/study.json``. A point is one model: what its mIoU is above
the dense model fine-tuned as long, and how much faster than the stock model the whole of it is.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use('Agg')
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / 'results' / 'study_upernet' / 'study.json'
STUDIES = {
    'Swin-N': 'backbone',
    'Swin-N with attention': 'attention too',
    'Swin-N, head 0.3': 'backbone and head',
    'R50-N': 'backbone',
    'R50-N, head 0.3': 'backbone and head',
}
COLORS = {'Swin-N': 'tab:blue', 'R50-N': 'tab:orange'}


def family(study: str) -> str:
    """Return the dense model that a study started from."""
    return study.split(',')[0].split(' ')[0]


def rows_of(table: list[dict], study: str) -> dict[str, dict]:
    """Return the rows of a study at keep ratio 0.7, and those of its dense model, by variant."""
    rows = [row for row in table if row['study'] == study and row['ratio'] in (None, 0.7)]
    return {row['variant']: row for row in rows}


def main() -> None:
    """Draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--out', type=Path, required=True, help='PNG file')
    args = parser.parse_args()
    table = json.loads(RESULTS.read_text())['table']
    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout='constrained')
    axes.axhline(0, color='grey', linewidth=1)
    axes.plot(1, 0, 's', color='black')
    axes.annotate('dense', (1, 0), xytext=(-4, 6), textcoords='offset points', fontsize=8)
    for study, sparse in STUDIES.items():
        base = rows_of(table, family(study))['dense, fine-tuned']['metrics']['mIoU']
        rows = rows_of(table, study)
        for variant, marker in (('learned', 'o'), ('random', 'x')):
            if variant not in rows:
                continue
            row = rows[variant]
            x = row['costs']['speed-up whole']
            y = np.mean(row['metrics']['mIoU']) - np.mean(base)
            axes.plot(x, y, marker, color=COLORS[family(study)])
            name = f'{family(study)}, {sparse}' + (', random' if variant == 'random' else '')
            left = x > 1.7
            axes.annotate(
                name,
                (x, y),
                xytext=(-6 if left else 6, 4 if study != 'R50-N' else -10),
                textcoords='offset points',
                ha='right' if left else 'left',
                fontsize=8,
            )
    axes.set(
        xlabel='speed-up of the whole model',
        ylabel='mIoU above dense',
        xlim=(0.95, 2.4),
        ylim=(-2.1, 0.45),
    )
    axes.set_title('UperNet on CamVid, keep ratio 0.7, head 0.3; 2 threads, batch 1', fontsize=9)
    figure.savefig(args.out, dpi=150)


if __name__ == '__main__':
    main()
