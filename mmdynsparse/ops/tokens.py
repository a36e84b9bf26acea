"""Sequences from which tokens are left out, and attention that ignores tokens.

Source: DynamicViT (Rao et al., NeurIPS 2021), section 3.3. Dimension letters: B images, T tokens
of the whole sequence, K tokens of the shortened one, C channels, h heads.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.checkpoint as cp
from torch import Tensor

from .regions import region


class TokenSubset(NamedTuple):
    """Which tokens of each image form the shortened sequence.

    Attributes:
        positions: (B, K) int64, ascending; where an image has fewer than K tokens, the rest is T.
        valid: (B, K) bool, False for that rest, or None if every image has K tokens.
    """

    positions: Tensor
    valid: Tensor | None


def token_subset(mask_BT: Tensor, count: int | None = None) -> TokenSubset:
    """Find the ones of a mask.

    Args:
        mask_BT: (B, T), 1 for the tokens that stay.
        count: How many there are in every image, if it is the same; nothing waits for the device
            then. Defaults to None, which counts.
    """
    with region('selection'):
        b, t = mask_BT.shape
        keep_BT = mask_BT > 0.5
        k = int(keep_BT.sum(1).max()) if count is None else count
        slot_BT = torch.where(keep_BT, keep_BT.cumsum(1) - 1, k)
        position_BT = torch.arange(t, device=mask_BT.device).expand(b, t)
        positions = torch.full((b, k + 1), t, device=mask_BT.device)
        positions = positions.scatter_(1, slot_BT, position_BT)[:, :k]
        # Tokens that leave all write to the spare slot, which is cut off.
        return TokenSubset(positions, None if count is not None else positions < t)


def take_tokens(x_BTC: Tensor, subset: TokenSubset) -> Tensor:
    """Return the shortened sequence (B, K, C); what is not valid is zero."""
    with region('gather'):
        if subset.valid is not None:
            x_BTC = F.pad(x_BTC, (0, 0, 0, 1))
        return x_BTC.gather(1, _expand(subset.positions, x_BTC))


def put_tokens(x_BTC: Tensor, tokens_BKC: Tensor, subset: TokenSubset) -> Tensor:
    """Return the whole sequence with the valid tokens of the shortened one in their places."""
    t = x_BTC.shape[1]
    with region('scatter'):
        if subset.valid is not None:
            x_BTC = F.pad(x_BTC, (0, 0, 0, 1))
        tokens_BKC = tokens_BKC.to(x_BTC.dtype)
        return x_BTC.scatter(1, _expand(subset.positions, x_BTC), tokens_BKC)[:, :t]


def policy_softmax(logits_BhTT: Tensor, policy_BT: Tensor, eps: float) -> Tensor:
    """Softmax over kept tokens and oneself (DynamicViT, eq. 10-11), computed in float32.

    Args:
        logits_BhTT: Attention logits.
        policy_BT: 1 for tokens that may be attended, 0 for dropped ones, with a gradient.
        eps: Added such that every weight has a gradient; published is 1e-6.
    """
    t = logits_BhTT.shape[-1]
    policy = policy_BT[:, None, None, :].float()
    policy = policy + (1 - policy) * torch.eye(t, device=policy.device)
    logits = logits_BhTT.float()
    weights = (logits - logits.amax(-1, keepdim=True)).exp() * policy
    return (weights + eps / t) / (weights.sum(-1, keepdim=True) + eps)


def attention_received(
    q_BhTD: Tensor,
    k_BhTD: Tensor,
    scale: float,
    queries: str = 'mean',
    valid_BT: Tensor | None = None,
) -> Tensor:
    """Return how much attention each token receives, (B, T) float32.

    It is computed head by head, and again in the backward pass, so that no more than (B, T, T)
    weights are alive at a time.

    Args:
        q_BhTD: Queries.
        k_BhTD: Keys.
        scale: Of the attention logits.
        queries: The mean over all heads is taken, and over the queries of all tokens ('mean'), or
            that of the first token alone ('cls'). Defaults to 'mean'.
        valid_BT: False for tokens that are not there, which neither attend nor are attended.
            Defaults to None, all are there.
    """
    if queries == 'cls':
        q_BhTD = q_BhTD[:, :, :1]
    # A compiler decides by itself what it computes again.
    again = q_BhTD.requires_grad and not torch.compiler.is_compiling()
    total_BT = 0
    for q_k in zip(q_BhTD.unbind(1), k_BhTD.unbind(1), strict=True):
        args = (*q_k, scale, valid_BT)
        if again:
            options = dict(use_reentrant=False, preserve_rng_state=False)
            total_BT = total_BT + cp.checkpoint(_received_in_head, *args, **options)
        else:
            total_BT = total_BT + _received_in_head(*args)
    return total_BT / q_BhTD.shape[1]


def _received_in_head(
    q_BQD: Tensor, k_BTD: Tensor, scale: float, valid_BT: Tensor | None
) -> Tensor:
    logits = (q_BQD * scale) @ k_BTD.transpose(1, 2)
    if valid_BT is None:
        return logits.softmax(-1, dtype=torch.float32).mean(1)
    logits = logits.masked_fill(~valid_BT.unsqueeze(1), torch.finfo(logits.dtype).min)
    asks_BQ1 = valid_BT[:, : q_BQD.shape[1], None]
    weights = logits.softmax(-1, dtype=torch.float32) * asks_BQ1
    return weights.sum(1) / asks_BQ1.sum(1).clamp(min=1)


def _expand(positions: Tensor, x_BTC: Tensor) -> Tensor:
    return positions.unsqueeze(-1).expand(-1, -1, x_BTC.shape[-1])
