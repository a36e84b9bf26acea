"""Light paths for dropped locations."""

import torch
from torch import Tensor, nn

from ..ops.kernels import LinearWeights
from ..registry import MODELS
from .linear import Linear
from .plain import check_plain


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
        self.fc = Linear(embed_dims, embed_dims)
        self.gamma = None
        if layer_scale is not None:
            self.gamma = nn.Parameter(torch.full((embed_dims,), layer_scale))

    def weights(self) -> LinearWeights:
        """Return the parameters for a fused kernel.

        Raises:
            ValueError: If the fast path or one of its layers has hooks or an adapter.
        """
        norm, fc = self.norm, self.fc
        check_plain('the fast path', self, LinearFastPath)
        check_plain("the fast path's norm", norm, nn.LayerNorm)
        check_plain("the fast path's linear layer", fc, nn.Linear, Linear)
        return LinearWeights(norm.weight, norm.bias, norm.eps, fc.weight, fc.bias, self.gamma)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (..., C) to their update (..., C)."""
        x = self.fc(self.norm(x))
        # Under autocast the parameter is float32, and the update shall be as without it.
        return x if self.gamma is None else (x * self.gamma).to(x.dtype)


@MODELS.register_module()
class LowRankFastPath(nn.Module):
    """Linear(C, C/16), ReLU and Linear(C/16, C): a light residual branch for ResNet.

    The last layer starts at zero, so that a dropped location first stays as it is.

    Args:
        embed_dims: Channels C of a location.
        reduction: Ratio of C to the width in between. Defaults to 16.

    Raises:
        ValueError: If ``reduction`` is not in 1 to C.
    """

    def __init__(self, embed_dims: int, reduction: int = 16) -> None:
        super().__init__()
        if not 1 <= reduction <= embed_dims:
            raise ValueError(f'reduction must be in 1 to {embed_dims}, got {reduction}')
        self.fc1 = Linear(embed_dims, embed_dims // reduction)
        self.fc2 = Linear(embed_dims // reduction, embed_dims)
        self.init_weights()

    def init_weights(self) -> None:
        """Start the last layer at zero, also after a backbone has initialized all its layers."""
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map locations (..., C) to their update (..., C)."""
        return self.fc2(self.fc1(x).relu())
