"""Sequences from which tokens are left out, and attention that ignores tokens.

Source: DynamicViT (Rao et al., NeurIPS 2021), section 3.3. Dimension letters: B images, T tokens
of the whole sequence, K tokens of the shortened one, C channels, h heads.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
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


def _expand(positions: Tensor, x_BTC: Tensor) -> Tensor:
    return positions.unsqueeze(-1).expand(-1, -1, x_BTC.shape[-1])
