"""Light paths for dropped locations."""

from mmengine.model import BaseModule
from torch import Tensor, nn

from ..registry import MODELS


@MODELS.register_module()
class LinearFastPath(BaseModule):
    """LayerNorm and Linear(C, C), the fast path of Rao et al. (T-PAMI 2023, section 3.3).

    Args:
        embed_dims: Channels C of a token.
        init_cfg: As in every OpenMMLab module. Defaults to None.
    """

    def __init__(self, embed_dims: int, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        self.norm = nn.LayerNorm(embed_dims)
        self.fc = nn.Linear(embed_dims, embed_dims)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (..., C) to their update (..., C)."""
        return self.fc(self.norm(x))
