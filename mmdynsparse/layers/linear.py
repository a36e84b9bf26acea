"""Linear layers and the FFN of transformers, with the parameters of torch's and OpenMMLab's."""

from mmcv.cnn import build_activation_layer
from mmengine.model import BaseModule, Sequential
from torch import Tensor, nn

from ..ops import Decision, linear, with_positions
from ..ops.kernels import MlpWeights, get_kernel


class Linear(nn.Linear):
    """``nn.Linear`` in the form that is fastest on the device, see ``ops.linear``."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C_in) to (..., C_out)."""
        return linear(x, self.weight, self.bias)


def linear_act(x: Tensor, fc: nn.Linear, act: nn.Module) -> Tensor:
    """Apply a linear layer and the activation that follows it, in one pass where possible."""
    if _is_gelu(act):
        return linear(x, fc.weight, fc.bias, gelu=True)
    return act(fc(x))


def mlp_weights(
    norm: nn.Module, fc1: nn.Linear, act: nn.Module, fc2: nn.Linear, gamma: Tensor | None = None
) -> MlpWeights:
    """Return the parameters of norm, linear, GELU, linear and LayerScale for a fused kernel.

    Raises:
        ValueError: If the norm is no layer norm or the activation is not the exact GELU.
    """
    if not isinstance(norm, nn.LayerNorm):
        raise ValueError(f'the norm must be a LayerNorm for fused kernels, got {norm}')
    if not _is_gelu(act):
        raise ValueError(f'the activation must be GELU for fused kernels, got {act}')
    weights = (fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    return MlpWeights(norm.weight, norm.bias, norm.eps, *weights, gamma)


def fused_paths(
    x_BNC: Tensor,
    residual_BNC: Tensor,
    slow: MlpWeights,
    fast_path: nn.Module | None,
    decision: Decision,
) -> Tensor:
    """Do what ``ops.two_paths`` does, gathered, in Triton kernels on a CUDA device.

    Args:
        x_BNC: Tokens, (B, N, C), in the dtype of the weights.
        residual_BNC: What the update is added to, (B, N, C).
        slow: Parameters of the slow path.
        fast_path: A :class:`LinearFastPath`, or None.
        decision: Which locations are kept.

    Returns:
        (B, N, C)
    """
    if decision.kept is None:
        decision = with_positions(decision)
    fast = None if fast_path is None else fast_path.weights()
    x, residual = x_BNC.flatten(0, 1), residual_BNC.flatten(0, 1)
    sparse_mlp = get_kernel('sparse_mlp')
    out = sparse_mlp(x, residual, decision.kept, decision.dropped, slow, fast)
    return out.view_as(residual_BNC)


def _is_gelu(act: nn.Module) -> bool:
    return isinstance(act, nn.GELU) and act.approximate == 'none'


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
            ValueError: If there are more than two linear layers, or the norm or the activation is
                none that the kernel knows.
        """
        *hidden, last, _ = self.layers
        if len(hidden) > 1:
            raise ValueError(f'num_fcs must be 2 for fused kernels, got {len(hidden) + 1}')
        fc, act, _ = hidden[0]
        return mlp_weights(norm, fc, act, last)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (..., C) to their update (..., C)."""
        *hidden, last, drop = self.layers
        for fc, act, hidden_drop in hidden:
            x = hidden_drop(linear_act(x, fc, act))
        return drop(last(x))
