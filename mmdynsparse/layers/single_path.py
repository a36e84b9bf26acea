"""Attentions and FFNs whose gates choose what is left of them (SPViT, the search).

Source: He et al., *Pruning Self-attentions into Convolutional Layers in Single Path* (arXiv
2111.11802). The convolutions see the whole map, unshifted and with zeros around it, where the
published Swin convolves within windows: so a search computes what the rebuilt model computes.

Dimension letters: B images, N locations of a map, T tokens (N and perhaps a class token), C
channels, D channels of a head.
"""

from abc import abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn

from ..ops import (
    Bottleneck,
    Kernels,
    bottleneck,
    chain,
    mix_heads,
    mixer_weights,
    open_gates,
    sample_gates,
    throttle,
)
from .linear import FFN, linear_act
from .token_attention import TokenMSA
from .window_attention import ShiftWindowMSA

# Positions of the kernels whose heads are mixed.
POSITIONS = 9


def current_gates(logits: Tensor, training: bool) -> Tensor:
    """Return gates: sampled in training, open where the probability is above 0.5 at inference."""
    return sample_gates(logits, torch.rand_like(logits)) if training else open_gates(logits)


class SinglePathMixer(nn.Module):
    """Base of attentions that may become a 3 x 3 or 1 x 1 bottleneck convolution, or nothing.

    The convolutions are made of the value and the output projection of the attention; their own
    are the logits of the head shares and a batch norm each.
    """

    def init_search(
        self, embed_dims: int, num_heads: int, alpha: float, init: float, norm_cfg: dict
    ) -> None:
        """Add the parameters of the search.

        Args:
            embed_dims: Channels C.
            num_heads: Attention heads.
            alpha: Divides the logits of the head shares.
            init: First logit of every gate.
            norm_cfg: The norm of the convolutions.
        """
        self.alpha = alpha
        self.head_logits = nn.Parameter(torch.ones(num_heads, POSITIONS))
        self.gate_logits = nn.Parameter(torch.full((3,), float(init)))
        self.mix_norm1 = build_norm_layer(norm_cfg, embed_dims // num_heads)[1]
        self.mix_norm3 = build_norm_layer(norm_cfg, embed_dims // num_heads)[1]

    def gates(self) -> Tensor:
        """Return the weights of conv1, conv3 and self-attention, (3,), at most one of them 1."""
        chained = chain(current_gates(self.gate_logits, self.training))
        return mixer_weights(throttle(chained) if self.training else chained)

    @abstractmethod
    def projections(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Return weight and bias of the value projection, and of the output projection."""

    def mix(
        self,
        x_BTC: Tensor,
        hw: tuple[int, int],
        weights_3: Tensor,
        attend: Callable[[], Tensor],
    ) -> Tensor:
        """Weigh the operations; at inference only the chosen one runs.

        Args:
            x_BTC: Tokens, normalized: those of the map, and before them perhaps a class token.
            hw: Height and width of the map.
            weights_3: From :meth:`gates`.
            attend: Computes the self-attention.

        Returns:
            The update of all tokens, (B, T, C).
        """
        kernels = mix_heads(*self.projections()[:3], self.head_logits, self.alpha)
        operations = (
            lambda: self._convolve(x_BTC, hw, kernels, self.mix_norm1, 1),
            lambda: self._convolve(x_BTC, hw, kernels, self.mix_norm3, 3),
            attend,
        )
        if self.training:
            weights = weights_3.to(x_BTC.dtype)
            return sum(w * run() for w, run in zip(weights, operations, strict=True))
        chosen = [run for w, run in zip(weights_3.tolist(), operations, strict=True) if w]
        return chosen[0]() if chosen else torch.zeros_like(x_BTC)

    def class_update(self, x_B1C: Tensor) -> Tensor:
        """Return what a convolution adds to the class token: zeros."""
        return torch.zeros_like(x_B1C)

    def _convolve(
        self, x_BTC: Tensor, hw: tuple[int, int], kernels: Kernels, norm: nn.Module, size: int
    ) -> Tensor:
        weights: Bottleneck = bottleneck(kernels, size)
        first = x_BTC.shape[1] - hw[0] * hw[1]
        x = x_BTC[:, first:].transpose(1, 2).unflatten(2, hw)
        x = F.conv2d(x, weights.reduce, weights.bias, padding=size // 2)
        x_BND = norm(x).relu().flatten(2).transpose(1, 2)
        update = self.proj_drop(F.linear(x_BND, weights.expand, self.projections()[3]))
        return torch.cat((self.class_update(x_BTC[:, :first]), update), 1) if first else update


class SinglePathWindowMSA(SinglePathMixer, ShiftWindowMSA):
    """Window attention with gates.

    Args:
        embed_dims: Channels C.
        num_heads: Attention heads.
        window_size: Side of a window, in tokens.
        search: Arguments ``alpha``, ``init`` and ``norm_cfg`` of ``init_search``.
        **kwargs: Further arguments of :class:`ShiftWindowMSA`.
    """

    def __init__(
        self, embed_dims: int, num_heads: int, window_size: int, *, search: dict, **kwargs
    ) -> None:
        super().__init__(embed_dims, num_heads, window_size, **kwargs)
        self.init_search(embed_dims, num_heads, **search)

    def projections(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Return weight and bias of the value projection, and of the output projection."""
        m = self.w_msa
        value = _last_third(m.qkv.weight), _last_third(m.qkv.bias)
        return *value, m.proj.weight, m.proj.bias

    def forward(self, x_BNC: Tensor, hw: tuple[int, int], weights_3: Tensor) -> Tensor:
        """Return the update (B, N, C) of the tokens of a map, by weights from ``gates``."""
        attend = super().forward
        return self.mix(x_BNC, hw, weights_3, lambda: attend(x_BNC, hw))


class SinglePathTokenMSA(SinglePathMixer, TokenMSA):
    """Self-attention over a sequence with gates; the convolutions leave a class token out.

    Args:
        embed_dims: Channels C.
        num_heads: Attention heads.
        *args: Further arguments of :class:`TokenMSA`.
        search: Arguments ``alpha``, ``init`` and ``norm_cfg`` of ``init_search``.
    """

    def __init__(self, embed_dims: int, num_heads: int, *args, search: dict) -> None:
        super().__init__(embed_dims, num_heads, *args)
        self.init_search(embed_dims, num_heads, **search)

    def projections(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Return weight and bias of the value projection, and of the output projection."""
        m = self.attn
        value = _last_third(m.in_proj_weight), _last_third(m.in_proj_bias)
        return *value, m.out_proj.weight, m.out_proj.bias

    def forward(self, x_BTC: Tensor, hw: tuple[int, int], weights_3: Tensor) -> Tensor:
        """Return the update (B, T, C) of class token and map, by weights from ``gates``."""
        attend = super().forward
        return self.mix(x_BTC, hw, weights_3, lambda: attend(x_BTC))


class GatedFFN(FFN):
    """FFN with a gate for each hidden unit, after the activation; the block sets their logits.

    Args:
        embed_dims: Channels C.
        feedforward_channels: Hidden units.
        act_cfg: Activation.
        num_fcs: Only 2. Defaults to 2.
        ffn_drop: Dropout after each layer. Defaults to 0.

    Raises:
        ValueError: If ``num_fcs`` is not 2.
    """

    def __init__(
        self,
        embed_dims: int,
        feedforward_channels: int,
        act_cfg: dict,
        num_fcs: int = 2,
        ffn_drop: float = 0.0,
    ) -> None:
        super().__init__(embed_dims, feedforward_channels, act_cfg, num_fcs, ffn_drop)
        if num_fcs != 2:
            raise ValueError(f'num_fcs must be 2 with pruning, got {num_fcs}')
        self.gate_logits = nn.Parameter(torch.ones(feedforward_channels))

    def gates(self) -> Tensor:
        """Return 1 for every hidden unit that is on, else 0, (hidden,)."""
        return current_gates(self.gate_logits, self.training)

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """Map tokens (..., C) to their update (..., C), by gates from ``gates``."""
        (fc, act, hidden_drop), last, drop = self.layers
        x = linear_act(x, fc, act)
        return drop(last(hidden_drop(x * gates.to(x.dtype))))


def _last_third(projection: Tensor | None) -> Tensor | None:
    """Return what of a joint projection belongs to the values."""
    return None if projection is None else projection[len(projection) // 3 * 2 :]
