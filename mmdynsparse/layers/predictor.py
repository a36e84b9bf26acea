"""Importance-score predictor (Rao et al., T-PAMI 2023, section 3.2; DynamicViT, eq. 1-4)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import linear
from ..registry import MODELS
from .linear import Linear, apply_linear
from .plain import is_plain


@MODELS.register_module()
class LocalGlobalPredictor(nn.Module):
    """Score every location from its own features and the mean of the map.

    LayerNorm, Linear(C, C), GELU; the first half of the channels stays local, the second half is
    replaced by its mean over all locations; then Linear(C, C/2), GELU, Linear(C/2, C/4), GELU,
    Linear(C/4, 2) and log-softmax. The layer that follows the mean is applied to the local half
    and, once for each image, to the mean: the same sum as on the concatenation.

    Args:
        embed_dims: Channels C of the map, at least 4.
        eps: Of the layer norm. Defaults to 1e-5.

    Raises:
        ValueError: If ``embed_dims`` is less than 4.
    """

    def __init__(self, embed_dims: int, eps: float = 1e-5) -> None:
        super().__init__()
        if embed_dims < 4:
            raise ValueError(f'embed_dims must be at least 4, got {embed_dims}')
        self.norm = nn.LayerNorm(embed_dims, eps=eps)
        self.fc_in = Linear(embed_dims, embed_dims)
        self.fc1 = Linear(embed_dims, embed_dims // 2)
        self.fc2 = Linear(embed_dims // 2, embed_dims // 4)
        self.fc3 = Linear(embed_dims // 4, 2)

    def forward(self, x_BNC: Tensor, among_BN: Tensor | None = None) -> Tensor:
        """Return (B, N, 2) float32 log-probabilities [keep, drop] of tokens (B, N, C).

        Args:
            x_BNC: Tokens.
            among_BN: 1 for the tokens over which the mean is taken (DynamicViT: those still
                kept), 0 for others. Defaults to None, all.
        """
        x_BNC = apply_linear(self.norm(x_BNC), self.fc_in, gelu=True)
        half = x_BNC.shape[-1] // 2
        mean_B1C = _mean(x_BNC[..., half:], among_BN)
        h = F.gelu(self._join(x_BNC[..., :half], mean_B1C))
        h = self.fc3(apply_linear(h, self.fc2, gelu=True))
        return F.log_softmax(h.float(), dim=-1)

    def _join(self, local_BNC: Tensor, mean_B1C: Tensor) -> Tensor:
        """Apply ``fc1`` to each token's local half with the mean."""
        if not is_plain(self.fc1, Linear, nn.Linear):
            mean_BNC = mean_B1C.expand(-1, local_BNC.shape[1], -1)
            return self.fc1(torch.cat((local_BNC, mean_BNC), dim=-1))
        widths = (local_BNC.shape[-1], mean_B1C.shape[-1])
        w_local, w_mean = self.fc1.weight.split(widths, dim=1)
        h = linear(local_BNC, w_local, None)
        return h.add_(linear(mean_B1C, w_mean, self.fc1.bias))


@MODELS.register_module()
class CellPredictor(nn.Module):
    """Score cells of a map from their mean features, at a reduced width.

    Linear(C, C / reduction), then :class:`LocalGlobalPredictor`. At full width and at every
    position the published predictor would cost 1.6 C^2, more than a ResNet bottleneck (1.06 C^2);
    this one costs 0.35 C^2 a cell: with cells of 4 x 4 positions 2% of the bottleneck.

    Args:
        embed_dims: Channels C of the map.
        reduction: Ratio of C to the predictor's width. Defaults to 4.

    Raises:
        ValueError: If the reduced width is less than 4.
    """

    def __init__(self, embed_dims: int, reduction: int = 4) -> None:
        super().__init__()
        if reduction < 1 or embed_dims // reduction < 4:
            raise ValueError(f'reduction must be in 1 to {embed_dims // 4}, got {reduction}')
        self.reduce = Linear(embed_dims, embed_dims // reduction)
        self.score = LocalGlobalPredictor(embed_dims // reduction)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Return (B, N, 2) float32 log-probabilities [keep, drop] of cell means (B, N, C)."""
        return self.score(self.reduce(x_BNC))


def _mean(x_BNC: Tensor, among_BN: Tensor | None) -> Tensor:
    if among_BN is None:
        return x_BNC.mean(1, keepdim=True)
    weights_BN1 = among_BN.to(x_BNC.dtype).unsqueeze(-1)
    total_B1C = (x_BNC * weights_BN1).sum(1, keepdim=True)
    return total_B1C / weights_BN1.sum(1, keepdim=True).clamp(min=1)
