"""What it would cost to select a share of an image's content alone in a padded batch.

    python benchmarks/padded_selection.py

Times ``topk_mask``, which keeps the same number in each image, beside a form that keeps a share of
what each image has: scores of padding count as minus infinity, and the numbers differ. Both find
the positions of the kept and dropped locations, as gathered execution does.
"""

import torch
from torch import Tensor

from mmdynsparse.analysis.latency import compare_latency
from mmdynsparse.ops import Decision, kept_and_dropped
from mmdynsparse.ops.select import num_kept, topk_mask

HW = (50, 84)  # stride 16 of 800 x 1344
CONTENT = ((50, 84), (50, 60))  # of two images
RATIO = 0.7


def fixed(scores_BN: Tensor) -> None:
    """Keep the same number in each image."""
    count = num_kept(scores_BN.shape[1], RATIO)
    kept_and_dropped(Decision(topk_mask(scores_BN, RATIO), scores_BN, HW, RATIO, count=count))


def of_content(scores_BN: Tensor, content_BN: Tensor, counts_B1: Tensor) -> None:
    """Keep a share of what each image has."""
    scores_BN = scores_BN.masked_fill(~content_BN, -torch.inf)
    order_BN = scores_BN.argsort(dim=1, descending=True)
    first_BN = (torch.arange(scores_BN.shape[1]) < counts_B1).float()
    mask_BN = torch.zeros_like(scores_BN).scatter_(1, order_BN, first_BN)
    kept_and_dropped(Decision(mask_BN, scores_BN, HW, RATIO))


def main() -> None:
    """Print the median time of both, in ms."""
    torch.manual_seed(0)
    scores_BN = torch.rand(len(CONTENT), HW[0] * HW[1]).log()
    content = torch.zeros(len(CONTENT), *HW, dtype=torch.bool)
    for i, (h, w) in enumerate(CONTENT):
        content[i, :h, :w] = True
    counts_B1 = torch.tensor([[num_kept(h * w, RATIO)] for h, w in CONTENT])
    functions = {
        'same number': lambda: fixed(scores_BN),
        'share of the content': lambda: of_content(scores_BN, content.flatten(1), counts_B1),
    }
    for name, latency in compare_latency(functions, rounds=200, warmup=20).items():
        print(f'{name}: {latency.median:.2f} ms')


if __name__ == '__main__':
    main()
