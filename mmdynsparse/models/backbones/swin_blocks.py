"""Blocks and stages of Swin."""

from collections.abc import Sequence
from typing import ClassVar

from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks.drop import DropPath
from mmengine.model import BaseModule, ModuleList
from torch import Tensor, nn

from ...layers import FFN, PatchMerging, ShiftWindowMSA
from ...ops import Plan, WindowRows, region, two_paths
from ...ops.kernels import MlpWeights
from ..decider import build_part
from .sparse_backbone import Block


class SwinBlock(Block):
    """Window attention, then FFN (slow) or fast path for each token.

    With ``shift`` the windows are shifted by half their side. ``fast_path`` is a config, or None
    for a block that is never sparse or whose dropped tokens stay as they are. With
    ``sparse_attention``, attention too updates kept tokens only. ``attn_kwargs`` are further
    arguments of :class:`ShiftWindowMSA`.
    """

    # Modules in whose place a subclass has others.
    attention_type: ClassVar[type[ShiftWindowMSA]] = ShiftWindowMSA
    ffn_type: ClassVar[type[FFN]] = FFN

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        feedforward_channels: int,
        window_size: int,
        shift: bool,
        drop_rate: float,
        drop_path_rate: float,
        act_cfg: dict,
        norm_cfg: dict,
        with_cp: bool,
        fast_path: dict | None,
        sparse_attention: bool,
        **attn_kwargs,
    ) -> None:
        super().__init__(with_cp)
        self.sparse_attention = sparse_attention
        self.norm1 = build_norm_layer(norm_cfg, embed_dims)[1]
        self.attn = self.attention_type(
            embed_dims,
            num_heads,
            window_size,
            shift_size=window_size // 2 if shift else 0,
            proj_drop_rate=drop_rate,
            **attn_kwargs,
        )
        self.norm2 = build_norm_layer(norm_cfg, embed_dims)[1]
        self.ffn = self.ffn_type(embed_dims, feedforward_channels, act_cfg, ffn_drop=drop_rate)
        self.fast_path = build_part(fast_path, embed_dims) if fast_path else None
        self.drop_path = DropPath(drop_path_rate)

    def _forward(
        self, x: Tensor, hw: tuple[int, int], plan: Plan, rows: WindowRows | None = None
    ) -> Tensor:
        """Return the block's output for tokens (B, N, C); ``rows`` as of ``find_rows``."""
        if rows is not None:
            return self._forward_kept(x, hw, plan, rows)
        x = self._attend(x, hw, plan)
        paths = (self._slow_path, self.fast_path)
        return two_paths(x, x, *paths, plan, self.drop_path, self._slow_weights)

    def _attend(self, x: Tensor, hw: tuple[int, int], plan: Plan) -> Tensor:
        """Return the tokens (B, N, C) after the attention."""
        update = self.attn(self.norm1(x), hw)
        if self.sparse_attention and plan.mask is not None:
            update = update * plan.mask.unsqueeze(-1).to(update.dtype)
        return x + self.drop_path(update)

    def find_rows(
        self, plan: Plan, batch: int, hw: tuple[int, int], found: dict
    ) -> WindowRows | None:
        """Find what the attention reads where only kept tokens are computed.

        Args:
            plan: Of the decision.
            batch: Images B.
            hw: Height and width of the map.
            found: What other blocks have found for this decision and this map.

        Returns:
            As of ``ShiftWindowMSA.kept_rows``; None where all tokens are computed.
        """
        if self.attn is None or not (self.sparse_attention and plan.gathers):
            return None
        key = self.attn.rows_key(hw)
        if key not in found:
            with region('gather'):
                found[key] = self.attn.kept_rows(plan.kept, batch, hw, plan.decision.cell_size)
        return found[key]

    def _forward_kept(self, x: Tensor, hw: tuple[int, int], plan: Plan, rows: WindowRows) -> Tensor:
        x_RC = x.flatten(0, 1)
        if rows.tokens is not None:
            with region('gather'):
                x_RC = x_RC.index_select(0, rows.tokens)
        update_KC = self.attn(self.norm1(x_RC), hw, rows)
        if plan.form == 'triton':
            with region('scatter'):
                # Not index_add: static shapes may list a token twice.
                x_PC = x.flatten(0, 1)
                kept_KC = x_PC.index_select(0, plan.kept) + update_KC
                x = x_PC.index_copy(0, plan.kept, kept_KC).view_as(x)
            paths = (self._slow_path, self.fast_path)
            return two_paths(x, x, *paths, plan, self.drop_path, self._slow_weights)

        # Attention and FFN of a kept token are one update, scattered once: x_KC are all of them.
        def slow_path(x_KC: Tensor) -> Tensor:
            return update_KC + self._slow_path(x_KC + update_KC)

        return two_paths(x, x, slow_path, self.fast_path, plan, self.drop_path)

    def _slow_path(self, x: Tensor) -> Tensor:
        return self.ffn(self.norm2(x))

    def _slow_weights(self) -> MlpWeights:
        return self.ffn.weights(self.norm2)


class SwinStage(BaseModule):
    """The blocks of one stage, its predictors, and the merging that follows it."""

    def __init__(self, blocks: Sequence[SwinBlock], predictors: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = ModuleList(blocks)
        self.predictors = ModuleList(predictors)
        self.downsample: PatchMerging | None = None
