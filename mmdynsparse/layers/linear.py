"""Linear layers and the FFN of transformers, with the parameters of torch's and OpenMMLab's."""

import torch
import torch.nn.functional as F
from mmcv.cnn import build_activation_layer
from mmengine.model import BaseModule, Sequential
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..ops import is_exporting, linear
from ..ops.kernels import MlpWeights
from .norm import LayerNorm2d
from .plain import check_plain, is_plain


class Linear(nn.Linear):
    """``nn.Linear`` in the form that is fastest on the device, see ``ops.linear``."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C_in) to (..., C_out)."""
        return linear(x, self.weight, self.bias)


def apply_linear(x: Tensor, fc: nn.Module, gelu: bool = False) -> Tensor:
    """Apply a linear layer, and the exact GELU if asked for, in one pass where possible."""
    # The last type is that of the output layer of nn.MultiheadAttention.
    if is_plain(fc, Linear, nn.Linear, NonDynamicallyQuantizableLinear):
        return linear(x, fc.weight, fc.bias, gelu)
    x = fc(x)
    return F.gelu(x) if gelu else x


def linear_act(x: Tensor, fc: nn.Module, act: nn.Module) -> Tensor:
    """Apply a linear layer and the activation that follows it, in one pass where possible."""
    if is_plain(act, nn.GELU) and act.approximate == 'none':
        return apply_linear(x, fc, gelu=True)
    return act(fc(x))


def mlp_weights(
    norm: nn.Module, fc1: nn.Module, act: nn.Module, fc2: nn.Module, gamma: Tensor | None = None
) -> MlpWeights:
    """Return the parameters of norm, linear, GELU, linear and LayerScale for a fused kernel.

    Raises:
        ValueError: If the norm is no layer norm, the activation is not the exact GELU, or one of
            the modules has hooks or an adapter.
    """
    check_plain('the norm', norm, nn.LayerNorm, LayerNorm2d)
    check_plain('the activation', act, nn.GELU)
    if act.approximate != 'none':
        raise ValueError(f'the activation must be GELU for fused kernels, exact, got {act}')
    for name, fc in (('the first linear layer', fc1), ('the second linear layer', fc2)):
        check_plain(name, fc, nn.Linear, Linear)
    weights = (fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    return MlpWeights(norm.weight, norm.bias, norm.eps, *weights, gamma)


class FFN(BaseModule):
    """Linear layers with activations between them, without the residual (mmcv's ``FFN``).

    Args:
        embed_dims: Channels C.
        feedforward_channels: Hidden channels.
        num_fcs: Linear layers, at least 2. Defaults to 2.
        act_cfg: Activation.
        ffn_drop: Dropout after each layer. Defaults to 0.

    Raises:
        ValueError: If ``num_fcs`` is less than 2.
    """

    def __init__(
        self,
        embed_dims: int,
        feedforward_channels: int,
        act_cfg: dict,
        num_fcs: int = 2,
        ffn_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if num_fcs < 2:
            raise ValueError(f'num_fcs must be at least 2, got {num_fcs}')
        widths = [embed_dims] + [feedforward_channels] * (num_fcs - 1)
        hidden = [
            Sequential(
                Linear(c, feedforward_channels),
                build_activation_layer(act_cfg),
                nn.Dropout(ffn_drop),
            )
            for c in widths[:-1]
        ]
        last = Linear(feedforward_channels, embed_dims)
        self.layers = Sequential(*hidden, last, nn.Dropout(ffn_drop))

    def weights(self, norm: nn.Module) -> MlpWeights:
        """Return the parameters, with those of the norm before, for a fused kernel.

        Raises:
            ValueError: If there are more than two linear layers, or as of :func:`mlp_weights`.
        """
        check_plain('the FFN', self, FFN)
        *hidden, last, _ = self.layers
        if len(hidden) > 1:
            raise ValueError(f'num_fcs must be 2 for fused kernels, got {len(hidden) + 1}')
        fc, act, _ = hidden[0]
        return mlp_weights(norm, fc, act, last)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (..., C) to their update (..., C)."""
        *hidden, last, drop = self.layers
        if is_exporting() and is_plain(last, Linear) and last.in_features == 0:
            return torch.zeros_like(x) + last.bias  # runtimes have no product without terms
        for fc, act, hidden_drop in hidden:
            x = hidden_drop(linear_act(x, fc, act))
        return drop(last(x))
