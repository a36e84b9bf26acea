"""Light paths for dropped locations."""

from torch import Tensor, nn

from ..registry import MODELS


@MODELS.register_module()
class LinearFastPath(nn.Module):
    """LayerNorm and Linear(C, C), the fast path of Rao et al. (T-PAMI 2023, section 3.3).

    Args:
        embed_dims: Channels C of a token.
    """

    def __init__(self, embed_dims: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dims)
        self.fc = nn.Linear(embed_dims, embed_dims)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (..., C) to their update (..., C)."""
        return self.fc(self.norm(x))
