"""Layer norm over the channels of a map."""

import torch.nn.functional as F
from torch import Tensor, nn

from .plain import is_plain


class LayerNorm2d(nn.LayerNorm):
    """Normalize every location of a map over its channels, as mmpretrain's ``LN2d``.

    A map that is channels last in memory is not copied.

    Args:
        channels: Channels C of the map.
        eps: As in ``nn.LayerNorm``. Defaults to 1e-6.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized map (B, C, H, W)."""
        return self._normalize(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def over_last(self, x: Tensor) -> Tensor:
        """Normalize a tensor (..., C) over its last dimension."""
        if is_plain(self, LayerNorm2d):
            return self._normalize(x)
        rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
        return self(rows).permute(0, 2, 3, 1).view(x.shape)

    def _normalize(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
