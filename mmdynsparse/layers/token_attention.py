"""Self-attention over a sequence with the parameters of OpenMMLab's vision transformers."""

import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..ops import attention_received, linear, policy_softmax, region
from .linear import apply_linear


class TokenMSA(BaseModule):
    """Multi-head self-attention, over all tokens or over the kept ones.

    Args:
        embed_dims: Channels C.
        num_heads: Attention heads, a divisor of C.
        attn_drop_rate: Dropout of the attention weights. Defaults to 0.
        proj_drop_rate: Dropout of the output. Defaults to 0.
        qkv_bias: Whether the projections have a bias. Defaults to True.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        # Holds the parameters under mmcv's names; its own forward is not used.
        self.attn = nn.MultiheadAttention(embed_dims, num_heads, attn_drop_rate, bias=qkv_bias)
        self.proj_drop = nn.Dropout(proj_drop_rate)

    def forward(
        self,
        x_BTC: Tensor,
        policy_BT: Tensor | None = None,
        valid_BT: Tensor | None = None,
        queries: str | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the attended tokens (B, T, C).

        Args:
            x_BTC: Tokens.
            policy_BT: 1 for tokens that may be attended, 0 for those that only see themselves
                (training), with a gradient. Defaults to None, all.
            valid_BT: False for tokens that are not there, which nobody attends. Defaults to None.
            queries: As of ``ops.attention_received``: with it, a pair is returned, of the tokens
                and of what each of those present receives from them. Defaults to None.
        """
        with region('attention'):
            q, k, v = _heads(self.attn, x_BTC)
            out = self._attend(q, k, v, policy_BT, valid_BT)
        if queries is None:
            return out
        with region('predictor'):
            present = valid_BT if policy_BT is None else policy_BT > 0.5
            return out, attention_received(q, k, self.attn.head_dim**-0.5, queries, present)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, policy_BT: Tensor | None, valid_BT: Tensor | None
    ) -> Tensor:
        m = self.attn
        if policy_BT is None:
            valid = None if valid_BT is None else valid_BT[:, None, None, :]
            drop = m.dropout if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=valid, dropout_p=drop)
        else:
            logits = (q * m.head_dim**-0.5) @ k.transpose(-2, -1)
            # The epsilon is there for the gradient only.
            eps = 1e-6 if policy_BT.requires_grad else 0.0
            weights = policy_softmax(logits, policy_BT, eps).to(v.dtype)
            out = F.dropout(weights, m.dropout, self.training) @ v
        return self.proj_drop(apply_linear(out.transpose(1, 2).flatten(2), m.out_proj))


def received_attention(attn: nn.MultiheadAttention, x_BTC: Tensor, queries: str) -> Tensor:
    """Return the attention that each token of its input receives in a layer, (B, T) float32."""
    q, k, _ = _heads(attn, x_BTC)
    return attention_received(q, k, attn.head_dim**-0.5, queries)


def _heads(attn: nn.MultiheadAttention, x_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values, (B, h, T, D)."""
    qkv = linear(x_BTC, attn.in_proj_weight, attn.in_proj_bias)
    return qkv.unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind()
