"""Blocks of Swin and of vision transformers that are pruned, or that gates search (SPViT)."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ...layers import (
    BottleneckConv,
    ConvRows,
    GatedFFN,
    SinglePathTokenMSA,
    SinglePathWindowMSA,
)
from ...ops import Plan, put_tokens, take_tokens
from ..pruning import BlockPruning, Pruning
from .swin_blocks import SwinBlock
from .vit_layers import Place, TransformerEncoderLayer

KERNEL_SIZES = dict(conv1=1, conv3=3)


class PassThrough(nn.Module):
    """Stands in for an attention whose normalized input is its output."""

    def forward(
        self, x: Tensor, hw: tuple[int, int] | None = None, rows: ConvRows | None = None
    ) -> Tensor:
        """Return the tokens as they are."""
        return x

    def kept_rows(
        self, kept_K: Tensor, batch: int, hw: tuple[int, int], cell_size: int = 1
    ) -> ConvRows:
        """Find what ``forward`` reads: the kept tokens."""
        return ConvRows(kept_K, None)

    def rows_key(self, hw: tuple[int, int]) -> str:
        """Return what ``kept_rows`` depends on beside the decision and the map."""
        return 'pass'


class SearchSwinBlock(SwinBlock):
    """Block of Swin with gates; ``search`` as of ``SinglePathWindowMSA``."""

    attention_type = SinglePathWindowMSA
    ffn_type = GatedFFN

    def __init__(self, embed_dims: int, *, search: dict, **kwargs) -> None:
        super().__init__(embed_dims, search=search, **kwargs)
        nn.init.constant_(self.ffn.gate_logits, search['init'])

    def forward(self, x: Tensor, hw: tuple[int, int], *args) -> Tensor:
        """Return the block's output for tokens (B, N, C), by gates of this forward."""
        # Checkpointing runs the block twice, with the same gates.
        return super().forward(x, hw, self.attn.gates(), self.ffn.gates())

    def _forward(self, x: Tensor, hw: tuple[int, int], weights_3: Tensor, units: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), hw, weights_3))
        return x + self.drop_path(self.ffn(self.norm2(x), units))


class PrunedSwinBlock(SwinBlock):
    """Block of Swin with what is left of its attention and its FFN."""

    def __init__(self, embed_dims: int, *, pruned: BlockPruning, **kwargs) -> None:
        with no_zero_size_warning():
            super().__init__(embed_dims, **{**kwargs, 'feedforward_channels': pruned.hidden})
        if pruned.mixer != 'msa':
            rates = dict(proj_drop_rate=kwargs['drop_rate'])
            attn = (embed_dims, kwargs['num_heads'], kwargs['qkv_bias'])
            self.attn = build_mixer(pruned, *attn, **rates)
            self.norm1 = None if self.attn is None else self.norm1

    def _attend(self, x: Tensor, hw: tuple[int, int], plan: Plan) -> Tensor:
        return x if self.attn is None else super()._attend(x, hw, plan)


class SearchLayer(TransformerEncoderLayer):
    """Layer of a vision transformer with gates; ``search`` as of ``SinglePathTokenMSA``."""

    attention_type = SinglePathTokenMSA
    ffn_type = GatedFFN

    def __init__(self, *args, search: dict) -> None:
        super().__init__(*args, search=search)
        nn.init.constant_(self.ffn.gate_logits, search['init'])

    def forward(self, x: Tensor, *args) -> Tensor:
        """Return the tokens (B, T, C) after the layer, by gates of this forward."""
        place: Place = args[-1]
        # Checkpointing runs the layer twice, with the same gates.
        return super().forward(x, place.hw, self.attn.gates(), self.ffn.gates())

    def _forward(self, x: Tensor, hw: tuple[int, int], weights_3: Tensor, units: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x), hw, weights_3)
        return x + self.drop_path(self.ffn(self.ln2(x), units))


class PrunedLayer(TransformerEncoderLayer):
    """Layer of a vision transformer with what is left of its attention and its FFN.

    Convolutions leave a class token out. A 3 x 3 convolution sees the whole map, where dropped
    tokens have the values that they had when they were dropped.
    """

    def __init__(self, embed_dims: int, num_heads: int, *args, pruned: BlockPruning) -> None:
        _, norm_cfg, qkv_bias, drop_rate, *others = args
        with no_zero_size_warning():
            own = (pruned.hidden, norm_cfg, qkv_bias, drop_rate)
            super().__init__(embed_dims, num_heads, *own, *others)
        self.norm_identity = pruned.norm_identity
        if pruned.mixer != 'msa':
            # nn.MultiheadAttention has one switch for the biases of all projections.
            rates = dict(out_bias=qkv_bias, proj_drop_rate=drop_rate)
            self.attn = build_mixer(pruned, embed_dims, num_heads, qkv_bias, **rates)
            self.ln1 = None if self.attn is None else self.ln1

    def _attend(self, x: Tensor, *args) -> tuple[Tensor, Tensor | None]:
        if self.attn is None:
            return torch.zeros_like(x), None
        if isinstance(self.attn, PassThrough):
            return self.ln1(x), None
        if isinstance(self.attn, BottleneckConv):
            return self._convolve(x, args[-1]), None
        return super()._attend(x, *args)

    def _convolve(self, x: Tensor, place: Place) -> Tensor:
        first = place.whole.shape[1] - place.hw[0] * place.hw[1]  # class tokens
        on_map = self.attn.kernel_size > 1 and place.subset is not None
        seen = self.ln1(put_tokens(place.whole, x, place.subset) if on_map else x)
        hw = place.hw if on_map or place.subset is None else (x.shape[1] - first, 1)
        update = self.attn(seen[:, first:], hw)
        cls = seen[:, :first]
        update = torch.cat((cls if self.norm_identity else torch.zeros_like(cls), update), 1)
        return take_tokens(update, place.subset) if on_map else update


def build_mixer(
    pruned: BlockPruning, embed_dims: int, num_heads: int, bias: bool, **kwargs
) -> nn.Module | None:
    """Build what stands in the place of an attention; arguments as of ``BottleneckConv``."""
    if pruned.mixer == 'none':
        return PassThrough() if pruned.norm_identity else None
    size = KERNEL_SIZES[pruned.mixer]
    return BottleneckConv(embed_dims, num_heads, size, pruned.norm_cfg, bias, **kwargs)


def block_type(
    base: type[nn.Module], pruning: Pruning | None, stage: int, block: int
) -> Callable[..., nn.Module]:
    """Return what builds a block, with the arguments of ``base``.

    Args:
        base: ``SwinBlock``, or ``TransformerEncoderLayer`` or a subclass.
        pruning: As of the backbone; None for ``base`` itself.
        stage: Index of the stage.
        block: Index of the block in it.
    """
    if pruning is None:
        return base
    search, pruned = TYPES[base]
    if pruning.search:
        return partial(search, search=pruning.search_cfg)
    return partial(pruned, pruned=pruning.block(stage, block))


TYPES = {
    SwinBlock: (SearchSwinBlock, PrunedSwinBlock),
    TransformerEncoderLayer: (SearchLayer, PrunedLayer),
}


@contextmanager
def no_zero_size_warning() -> Iterator[None]:
    """Build linear layers without hidden units, which torch warns of."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='Initializing zero-element tensors')
        yield
