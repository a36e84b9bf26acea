"""Layers of vision transformers."""

from typing import ClassVar, NamedTuple

import torch
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks.drop import DropPath
from torch import Tensor

from ...layers import FFN, TokenMSA
from ...ops import TokenSubset
from .sparse_backbone import Block


class Place(NamedTuple):
    """Where the tokens of a layer come from, which convolutions ask for.

    Attributes:
        hw: Height and width of the map.
        whole: All tokens (B, T, C), those of the subset as they were when it was chosen.
        subset: Which tokens the layer has; None for all.
    """

    hw: tuple[int, int]
    whole: Tensor
    subset: TokenSubset | None


class TransformerEncoderLayer(Block):
    """Attention and FFN over all tokens, or over the kept ones; arguments as of the backbone.

    ``attn_kwargs`` are further arguments of the attention.
    """

    # Modules in whose place a subclass has others.
    attention_type: ClassVar[type[TokenMSA]] = TokenMSA
    ffn_type: ClassVar[type[FFN]] = FFN

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        feedforward_channels: int,
        norm_cfg: dict,
        qkv_bias: bool,
        drop_rate: float,
        attn_drop_rate: float,
        drop_path_rate: float,
        act_cfg: dict,
        num_fcs: int,
        with_cp: bool,
        **attn_kwargs,
    ) -> None:
        super().__init__(with_cp)
        self.ln1 = build_norm_layer(norm_cfg, embed_dims)[1]
        rates = (attn_drop_rate, drop_rate)
        self.attn = self.attention_type(embed_dims, num_heads, *rates, qkv_bias, **attn_kwargs)
        self.ln2 = build_norm_layer(norm_cfg, embed_dims)[1]
        self.ffn = self.ffn_type(
            embed_dims, feedforward_channels, act_cfg, num_fcs, ffn_drop=drop_rate
        )
        self.drop_path = DropPath(drop_path_rate)

    def _forward(
        self,
        x: Tensor,
        policy_BT: Tensor | None = None,
        valid_BT: Tensor | None = None,
        queries: str | None = None,
        place: Place | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the tokens (B, T, C) after the layer; arguments and pairs as of ``TokenMSA``.

        Tokens that the policy drops stay as they are. Pruned layers need ``place``.
        """
        update, received_BT = self._attend(x, policy_BT, valid_BT, queries, place)
        y = x + update
        y = y + self.drop_path(self.ffn(self.ln2(y)))
        if policy_BT is not None:
            y = torch.lerp(x, y, policy_BT.unsqueeze(-1).to(y.dtype))
        return y if queries is None else (y, received_BT)

    def _attend(
        self,
        x: Tensor,
        policy_BT: Tensor | None,
        valid_BT: Tensor | None,
        queries: str | None,
        place: Place | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention's update (B, T, C), and what tokens receive where it is asked."""
        out = self.attn(self.ln1(x), policy_BT, valid_BT, queries)
        return (out, None) if queries is None else out
