"""Linear layers and the FFN of transformers, with the parameters of torch's and OpenMMLab's."""

from mmcv.cnn import build_activation_layer
from mmengine.model import BaseModule, Sequential
from torch import Tensor, nn

from ..ops import linear


class Linear(nn.Linear):
    """``nn.Linear`` in the form that is fastest on the device, see ``ops.linear``."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C_in) to (..., C_out)."""
        return linear(x, self.weight, self.bias)


def linear_act(x: Tensor, fc: nn.Linear, act: nn.Module) -> Tensor:
    """Apply a linear layer and the activation that follows it, in one pass where possible."""
    if isinstance(act, nn.GELU) and act.approximate == 'none':
        return linear(x, fc.weight, fc.bias, gelu=True)
    return act(fc(x))


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

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (..., C) to their update (..., C)."""
        *hidden, last, drop = self.layers
        for fc, act, hidden_drop in hidden:
            x = hidden_drop(linear_act(x, fc, act))
        return drop(last(x))
