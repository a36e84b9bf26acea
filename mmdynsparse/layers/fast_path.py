"""Light paths for dropped locations."""

import torch
from torch import Tensor, nn

from ..registry import MODELS


@MODELS.register_module()
class LinearFastPath(nn.Module):
    """LayerNorm and Linear(C, C), the fast path of Rao et al. (T-PAMI 2023, section 3.3).

    Args:
        embed_dims: Channels C of a token.
        eps: Of the layer norm. Defaults to 1e-5.
        layer_scale: Initial value of a LayerScale of its own, as in ConvNeXt. Defaults to None,
            no LayerScale.
    """

    def __init__(
        self, embed_dims: int, eps: float = 1e-5, layer_scale: float | None = None
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dims, eps=eps)
        self.fc = nn.Linear(embed_dims, embed_dims)
        self.gamma = None
        if layer_scale is not None:
            self.gamma = nn.Parameter(torch.full((embed_dims,), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (..., C) to their update (..., C)."""
        x = self.fc(self.norm(x))
        return x if self.gamma is None else x * self.gamma
