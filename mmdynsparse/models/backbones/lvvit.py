"""Sparse LV-ViT.

Sources: Jiang et al., *All Tokens Matter* (arXiv 2104.10858), as ``LV_ViT`` of
zihangJiang/TokenLabeling; Rao et al., *DynamicViT* (NeurIPS 2021), for its sparse form. It is a
vision transformer with another stem and halved residual branches, and has the arguments and
state-dict names of :class:`SparseVisionTransformer`; the stem's are the published ones.
"""

import torch
from mmcv.cnn.bricks.drop import DropPath
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...layers import ConvPatchEmbed
from ...registry import MODELS
from .vit import SparseVisionTransformer
from .vit_layers import TransformerEncoderLayer

# What the residual branches of LV-ViT-S and -M are divided by.
SKIP_LAM = 2.0


class DividedDropPath(DropPath):
    """Stochastic depth of a residual branch, which is then divided by ``SKIP_LAM``."""

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the tokens (B, T, C)."""
        return super().forward(x) / SKIP_LAM


class LVViTLayer(TransformerEncoderLayer):
    """The layer of a vision transformer, both of whose branches are divided and may be dropped.

    The attention's output has a bias whether or not queries, keys and values have one.
    """

    def __init__(self, embed_dims: int, *args) -> None:
        super().__init__(embed_dims, *args)
        self.drop_path = DividedDropPath(self.drop_path.drop_prob)
        self.attn.proj_drop = nn.Sequential(self.attn.proj_drop, self.drop_path)
        self.attn.attn.out_proj.bias = nn.Parameter(torch.zeros(embed_dims))


@MODELS.register_module()
class SparseLVViT(SparseVisionTransformer):
    """LV-ViT whose dropped tokens leave the sequence; by default LV-ViT-S.

    LV-ViT-M has 512 channels, 20 layers and 8 heads. The published places of the predictors are
    the default ones.

    Args:
        patch_size: Side of a patch, in px: an even number. Defaults to 16.
        embed_dims: Channels. Defaults to 384.
        num_layers: Layers. Defaults to 16.
        num_heads: Attention heads. Defaults to 6.
        mlp_ratio: Hidden channels of an FFN per channel. Defaults to 3.
        qkv_bias: Whether queries, keys and values have a bias. Defaults to False.
        patch_bias: Whether the projection of the patches has a bias. Defaults to True.
        norm_eval: Whether the batch norms of the stem keep their statistics in training, as they
            do where they do not learn. Defaults to False.
        **kwargs: Other arguments of :class:`SparseVisionTransformer`, but ``pruning``.

    Raises:
        ValueError: If an argument is outside its range.
    """

    # No OpenMMLab library has it: the class itself without ``sparsity`` is the dense model.
    original = 'LVViT'
    patch_embed_type = ConvPatchEmbed
    layer_type = LVViTLayer

    def __init__(
        self,
        *,
        patch_size: int = 16,
        embed_dims: int = 384,
        num_layers: int = 16,
        num_heads: int = 6,
        mlp_ratio: int = 3,
        qkv_bias: bool = False,
        patch_bias: bool = True,
        norm_eval: bool = False,
        **kwargs,
    ) -> None:
        if kwargs.get('pruning') is not None:
            raise ValueError(f'pruning must be None in a SparseLVViT, got {kwargs["pruning"]}')
        super().__init__(
            patch_size=patch_size,
            embed_dims=embed_dims,
            num_layers=num_layers,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            patch_bias=patch_bias,
            **kwargs,
        )
        self.norm_eval = norm_eval

    def train(self, mode: bool = True) -> 'SparseLVViT':
        """Set the training mode; batch norms that keep their statistics stay in eval mode."""
        super().train(mode)
        for m in self.patch_embed.modules():
            if isinstance(m, _BatchNorm) and (self.norm_eval or not m.weight.requires_grad):
                m.eval()
        return self
