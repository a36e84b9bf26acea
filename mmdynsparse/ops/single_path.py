"""One path of parameters for self-attention and for the convolutions that may replace it (SPViT).

Source: He et al., *Pruning Self-attentions into Convolutional Layers in Single Path* (T-PAMI,
arXiv 2111.11802): gates, kernels made of an attention's own weights, and the cost of each
operation. The formulas were checked against ziplab/SPViT; the code is our own.

Dimension letters: h heads, C channels, D = C / h, K = 9 positions of a 3 x 3 kernel, row by row (4
is the centre), N locations of a map, T tokens (N and perhaps a class token).
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# What a block may have in the place of its self-attention, the cheapest first.
MIXERS = ('none', 'conv1', 'conv3', 'msa')
# One letter for each in the log.
MIXER_LETTERS = dict(zip(MIXERS, '-13M', strict=True))
CENTRE = 4
# The published samples are clamped to this distance from 0 and 1.
_EPS = torch.finfo(torch.float32).eps


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """Return the value of ``hard``, exactly, with the gradient of ``soft``."""
    return hard + (soft - soft.detach())


def sample_gates(logits: Tensor, uniform: Tensor) -> Tensor:
    """Sample binary gates: a relaxed Bernoulli of temperature 1, hard, straight-through.

    Args:
        logits: Logits of the probability that a gate is open, of any shape.
        uniform: Uniform random numbers in [0, 1), of this shape.

    Returns:
        0 or 1 for each, with the gradient of the relaxed sample.
    """
    noise = uniform.clamp(_EPS, 1 - _EPS)
    odds = logits + noise.log() - (-noise).log1p()
    return straight_through((odds > 0).to(odds.dtype), odds.sigmoid())


def open_gates(logits: Tensor) -> Tensor:
    """Return 1 for the gates that are open at inference (probability above 0.5), else 0."""
    return (logits > 0).to(logits.dtype)


def chain(gates_3: Tensor) -> Tensor:
    """Return the cumulative products of three gates: a gate counts if those before are open."""
    g1, g2, g3 = gates_3.unbind(-1)
    return torch.stack((g1, g1 * g2, g1 * g2 * g3), -1)


def throttle(chained_3: Tensor) -> Tensor:
    """Cut the gradient of every chained gate after which another one is open.

    What an open gate learns is then about the most expensive operation that is on, and about the
    next one, which is off.
    """
    g1, g2, g3 = chained_3.unbind(-1)
    g1 = torch.where(g2.detach() > 0, g1.detach(), g1)
    g2 = torch.where(g3.detach() > 0, g2.detach(), g2)
    return torch.stack((g1, g2, g3), -1)


def mixer_weights(chained_3: Tensor) -> Tensor:
    """Return the weights of conv1, conv3 and self-attention: at most one is 1, the others 0."""
    g1, g2, g3 = chained_3.unbind(-1)
    return torch.stack((g1 * (1 - g2) * (1 - g3), g2 * (1 - g3), g3), -1)


def cost_gates(logits: Tensor) -> Tensor:
    """Return 1 for open gates and 0 for closed ones, with a gradient for the cost.

    The gradient is that of sigmoid(p - 0.5), p = sigmoid(logits). Nothing is sampled.
    """
    return straight_through(open_gates(logits), (logits.sigmoid() - 0.5).sigmoid())


class Kernels(NamedTuple):
    """What the heads of an attention are mixed to, for each position of the kernel."""

    reduce: Tensor  # (K, D, C), from the value projection
    bias: Tensor | None  # (K, D), from its bias
    expand: Tensor  # (K, C, D), from the output projection


class Bottleneck(NamedTuple):
    """Weights of a convolution from C to D channels and of a linear layer back."""

    reduce: Tensor  # (D, C, k, k)
    bias: Tensor | None  # (D,)
    expand: Tensor  # (C, D)


def mix_heads(
    value: Tensor, value_bias: Tensor | None, output: Tensor, head_logits_hK: Tensor, alpha: float
) -> Kernels:
    """Mix the heads of an attention, with shares of their own for each position of a kernel.

    Args:
        value: Weight of the value projection, (C, C); head i has the rows i D to (i + 1) D.
        value_bias: Its bias, (C,), or None.
        output: Weight of the output projection, (C, C); head i has the columns i D to (i + 1) D.
        head_logits_hK: Logits of the shares.
        alpha: Divides the logits: a large one leaves the shares uniform.
    """
    heads = len(head_logits_hK)
    p_hK = (head_logits_hK / alpha).softmax(0)
    value_hDC = value.unflatten(0, (heads, -1))
    output_ChD = output.unflatten(1, (heads, -1))
    bias = None
    if value_bias is not None:
        bias = torch.einsum('hk,hd->kd', p_hK, value_bias.unflatten(0, (heads, -1)))
    reduce = torch.einsum('hk,hdc->kdc', p_hK, value_hDC)
    return Kernels(reduce, bias, torch.einsum('hk,chd->kcd', p_hK, output_ChD))


def bottleneck(kernels: Kernels, kernel_size: int) -> Bottleneck:
    """Return the weights of the 3 x 3 bottleneck, or of the 1 x 1 one at its centre."""
    parts = kernels
    if kernel_size == 1:
        parts = Kernels(*(None if part is None else part[CENTRE, None] for part in kernels))
    reduce_DCkk = parts.reduce.permute(1, 2, 0).unflatten(2, (kernel_size, kernel_size))
    bias = None if parts.bias is None else parts.bias.sum(0)
    return Bottleneck(reduce_DCkk, bias, parts.expand.sum(0))


class BlockShape(NamedTuple):
    """What the cost of a block depends on, at one input size."""

    locations: int  # N
    tokens: int  # T
    pairs: int  # pairs of query and key, those in the padding of windows included
    channels: int  # C
    heads: int  # h


def mixer_macs(shape: BlockShape) -> Mapping[str, int]:
    """Return the multiply-adds of each of ``MIXERS``: matrix products and convolutions."""
    n, t, pairs, c, heads = shape
    square = c * (c // heads)
    msa = 4 * t * c**2 + 2 * pairs * c
    return dict(none=0, conv1=2 * n * square, conv3=10 * n * square, msa=msa)


def ffn_macs(shape: BlockShape) -> int:
    """Return the multiply-adds of one hidden unit of a block's FFN."""
    return 2 * shape.tokens * shape.channels


def gated_cost(cost_gates_3: Tensor, costs: Mapping[str, float]) -> Tensor:
    """Return the cost of a mixer by its gates.

    Args:
        cost_gates_3: From ``cost_gates``, (3,).
        costs: Of each of ``MIXERS``.
    """
    g1, g2, g3 = chain(cost_gates_3).unbind(-1)
    none, conv1, conv3, msa = (costs[name] for name in MIXERS)
    return none + g1 * (conv1 - none) + g2 * (conv3 - conv1) + g3 * (msa - conv3)


def chosen_mixer(logits_3: Tensor) -> str:
    """Return the operation that gates choose at inference, one of ``MIXERS``."""
    return MIXERS[int(chain(open_gates(logits_3)).sum())]
