"""Maps, decisions and comparisons of the tests of dense heads."""

import torch

from mmdynsparse.ops import Decision


def neck_maps(levels, hw=(32, 32)):
    """Maps of a neck; each level halves the size and rounds up."""
    torch.manual_seed(0)
    sizes = [hw]
    while len(sizes) < levels:
        sizes.append(tuple((side + 1) // 2 for side in sizes[-1]))
    return tuple(torch.randn(2, 16, *size) for size in sizes)


def left_half(ratio=0.5):
    """The decision that keeps the left half of the first image, nothing of the other."""
    masks = torch.zeros(2, 4, 4)
    masks[0, :, :2] = 1
    return Decision(masks.flatten(1), torch.zeros(2, 16), (32, 32), ratio, 8)


def run(head, x, execution='gather'):
    head.decider.execution = execution
    return head(x)


def close(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
