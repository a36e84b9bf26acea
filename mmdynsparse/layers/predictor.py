"""Predictors: what scores the importance of the locations of a map.

Sources: Rao et al., T-PAMI 2023, section 3.2, and DynamicViT, eq. 1-4, for those that learn; Li et
al., *SaiT* (arXiv 2210.05832), for the attention that tokens receive; Chen et al., *SparseViT*
(arXiv 2303.17605), for the magnitude of activations. The formulas of the last two are our own.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import cell_means, linear
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


@MODELS.register_module()
class AttentionScore(nn.Module):
    """Score tokens by the attention that they receive in the layer before.

    A token's score is its share of the attention that all patch tokens receive. There is nothing
    to learn; the gradient of the scores reaches the layer, so that distillation can teach it where
    to look. Only for ``SparseVisionTransformer``.

    Args:
        embed_dims: Channels; not used.
        queries: Whose attention: 'mean' of all tokens, or 'cls', of the class token. Defaults to
            'mean': the heads of segmentors do not train the class token.

    Raises:
        ValueError: If ``queries`` is neither.
    """

    learns: ClassVar[bool] = False
    reads: ClassVar[str] = 'attention'

    def __init__(self, embed_dims: int, queries: str = 'mean') -> None:
        super().__init__()
        if queries not in ('mean', 'cls'):
            raise ValueError(f"queries must be 'mean' or 'cls', got {queries!r}")
        self.queries = queries

    def forward(self, received_BN: Tensor, among_BN: Tensor | None = None) -> Tensor:
        """Return (B, N, 2) float32 log-probabilities [keep, drop], of shares that add up to 1.

        Args:
            received_BN: Attention that each token receives.
            among_BN: 1 for the tokens that are there, 0 for others, whose log-probabilities are
                -inf. Defaults to None, all.
        """
        return _log_shares(received_BN, among_BN)


@MODELS.register_module()
class MagnitudeScore(nn.Module):
    """Score cells by how large their features are, without anything to learn.

    A cell's score is its share of the root mean square, over the cell's locations, of the mean of
    abs(x) over the channels: the L2 norm by which SparseViT scores windows, but that a cell at the
    edge, which has fewer locations, is not put at a disadvantage.

    Args:
        embed_dims: Channels; not used.
    """

    learns: ClassVar[bool] = False

    def __init__(self, embed_dims: int) -> None:
        super().__init__()

    @staticmethod
    def pool(x_BCHW: Tensor, size: int) -> Tensor:
        """Return what is looked at of cells of ``size`` x ``size`` positions, (B, N, 1)."""
        magnitude_B1HW = x_BCHW.float().abs().mean(1, keepdim=True)
        return cell_means(magnitude_B1HW.square(), size).sqrt()

    def forward(self, x_BNC: Tensor, among_BN: Tensor | None = None) -> Tensor:
        """Return (B, N, 2) float32 log-probabilities [keep, drop], of shares that add up to 1.

        Args:
            x_BNC: What ``pool`` returns, or tokens.
            among_BN: As of :class:`AttentionScore`. Defaults to None, all.
        """
        return _log_shares(x_BNC.float().abs().mean(-1), among_BN)


def _log_shares(values_BN: Tensor, among_BN: Tensor | None) -> Tensor:
    """Return log s and log(1 - s), (B, N, 2), of the shares s of positive values in their sum."""
    if among_BN is not None:
        values_BN = values_BN * (among_BN > 0)
    tiny = torch.finfo(torch.float32).tiny
    share_BN = values_BN.float() / values_BN.float().sum(1, keepdim=True).clamp(min=tiny)
    # Clamped, because the gradient of log 0 is no number.
    log_probs_BN2 = torch.stack((share_BN, 1 - share_BN), -1).clamp(min=tiny).log()
    if among_BN is None:
        return log_probs_BN2
    return log_probs_BN2.masked_fill(among_BN.unsqueeze(-1) == 0, -torch.inf)


def _mean(x_BNC: Tensor, among_BN: Tensor | None) -> Tensor:
    if among_BN is None:
        return x_BNC.mean(1, keepdim=True)
    weights_BN1 = among_BN.to(x_BNC.dtype).unsqueeze(-1)
    total_B1C = (x_BNC * weights_BN1).sum(1, keepdim=True)
    return total_B1C / weights_BN1.sum(1, keepdim=True).clamp(min=1)
