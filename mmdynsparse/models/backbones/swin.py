"""Sparse Swin Transformer.

Sources: Liu et al., *Swin Transformer* (arXiv 2103.14030); Rao et al., *Dynamic Spatial
Sparsification* (T-PAMI 2023, arXiv 2207.01580). Arguments and state-dict names are those of
``SwinTransformer`` in mmsegmentation 1.x and mmdetection 3.x; what is added are predictors
(``stages.I.predictors.J``) and fast paths (``stages.I.blocks.K.fast_path``).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
import torch.utils.checkpoint as cp
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks.drop import DropPath
from mmengine.logging import print_log
from mmengine.model import BaseModule, ModuleList
from mmengine.model.weight_init import constant_init, trunc_normal_, trunc_normal_init
from mmengine.utils import to_2tuple
from torch import Tensor, nn

from ...layers import FFN, PatchEmbed, PatchMerging, ShiftWindowMSA, fused_paths
from ...ops import Decision, WindowRows, gathering_pays, region, two_paths, with_positions
from ...registry import MODELS
from ...utils.checkpoint import load_pretrained, resize_bias_table, resize_pos_embed
from .sparse_backbone import (
    SparseBackbone,
    build_part,
    check_stages,
    checkpoint_cfg,
    freeze,
    may_be_new,
)

# Decides for the tokens of a map of this height and width: by a predictor, or as the last time.
Decide = Callable[[Tensor, tuple[int, int], nn.Module | None, Decision | None], Decision]


class SwinBlock(BaseModule):
    """Window attention, then FFN (slow) or fast path for each token.

    Args:
        embed_dims: Channels C.
        num_heads: Attention heads.
        feedforward_channels: Hidden channels of the FFN.
        window_size: Side of a window, in tokens.
        shift: Whether windows are shifted by half their side.
        drop_rate: Dropout of the FFN and of the attention's output.
        drop_path_rate: Stochastic depth of both residual branches.
        act_cfg: Activation of the FFN.
        norm_cfg: Normalization.
        with_cp: Whether activations are recomputed in the backward pass.
        fast_path: Config of the fast path, or None for a block that is never sparse or whose
            dropped tokens stay as they are.
        sparse_attention: Whether attention updates kept tokens only.
        **attn_kwargs: Further arguments of :class:`ShiftWindowMSA`.
    """

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
        super().__init__()
        self.with_cp = with_cp
        self.sparse_attention = sparse_attention
        self.norm1 = build_norm_layer(norm_cfg, embed_dims)[1]
        self.attn = ShiftWindowMSA(
            embed_dims,
            num_heads,
            window_size,
            shift_size=window_size // 2 if shift else 0,
            proj_drop_rate=drop_rate,
            **attn_kwargs,
        )
        self.norm2 = build_norm_layer(norm_cfg, embed_dims)[1]
        self.ffn = FFN(
            embed_dims,
            feedforward_channels,
            act_cfg,
            ffn_drop=drop_rate,
        )
        self.fast_path = build_part(fast_path, embed_dims) if fast_path else None
        self.drop_path = DropPath(drop_path_rate)

    def forward(
        self,
        x: Tensor,
        hw: tuple[int, int],
        decision: Decision | None,
        execution: str,
        rows: WindowRows | None = None,
    ) -> Tensor:
        """Return the block's output for tokens (B, N, C); without a decision it is dense.

        Args:
            x: Tokens.
            hw: Height and width of the map.
            decision: Which tokens are kept, or None.
            execution: How a sparse block is executed.
            rows: What attention reads if it is sparse and gathered. Defaults to None.
        """
        args = (x, hw, decision, execution, rows)
        if self.with_cp and x.requires_grad:
            return cp.checkpoint(self._forward, *args, use_reentrant=False)
        return self._forward(*args)

    def _forward(
        self,
        x: Tensor,
        hw: tuple[int, int],
        decision: Decision | None,
        execution: str,
        rows: WindowRows | None,
    ) -> Tensor:
        if rows is not None:
            return self._forward_kept(x, hw, decision, execution, rows)
        # In training the mask and the fast path take part even at keep ratio 1: no parameter is
        # without a gradient, and the mask of ones gives the slow path's value exactly.
        dense = decision is None or (decision.keeps_all and not self.training)
        update = self.attn(self.norm1(x), hw)
        if self.sparse_attention and not dense:
            update = update * decision.mask.unsqueeze(-1).to(update.dtype)
        x = x + self.drop_path(update)
        if dense:
            return x + self.drop_path(self._slow_path(x))
        if execution == 'triton':
            slow = self.ffn.weights(self.norm2)
            return fused_paths(x, x, slow, self.fast_path, decision)
        gather = execution == 'gather' and gathering_pays(decision, self.fast_path)
        return two_paths(x, x, self._slow_path, self.fast_path, decision, gather, self.drop_path)

    def _forward_kept(
        self,
        x: Tensor,
        hw: tuple[int, int],
        decision: Decision,
        execution: str,
        rows: WindowRows,
    ) -> Tensor:
        x_RC = x.flatten(0, 1)
        if rows.tokens is not None:
            with region('gather'):
                x_RC = x_RC.index_select(0, rows.tokens)
        update_KC = self.attn(self.norm1(x_RC), hw, rows)
        if execution == 'triton':
            with region('scatter'):
                # Not index_add: static shapes may list a token twice.
                x_PC, kept = x.flatten(0, 1), decision.kept
                x = x_PC.index_copy(0, kept, x_PC.index_select(0, kept) + update_KC).view_as(x)
            slow = self.ffn.weights(self.norm2)
            return fused_paths(x, x, slow, self.fast_path, decision)

        # Attention and FFN of a kept token are one update, scattered once: x_KC are all of them.
        def slow_path(x_KC: Tensor) -> Tensor:
            return update_KC + self._slow_path(x_KC + update_KC)

        return two_paths(x, x, slow_path, self.fast_path, decision, True, self.drop_path)

    def _slow_path(self, x: Tensor) -> Tensor:
        return self.ffn(self.norm2(x))


class SwinStage(BaseModule):
    """The blocks of one stage, its predictors, and the merging that follows it.

    Args:
        embed_dims: Channels C.
        depth: Number of blocks.
        drop_path_rates: Stochastic depth of each block.
        downsample: The merging after the stage, or None. The backbone calls it.
        locations: Blocks before which a predictor decides.
        predictors: What decides before them, nothing in a stage that follows.
        fast_path: Config of the fast paths of the blocks from the first location on.
        sparse_attention: Whether attention updates kept tokens only.
        **block_kwargs: Further arguments of :class:`SwinBlock`.
    """

    def __init__(
        self,
        embed_dims: int,
        depth: int,
        drop_path_rates: Sequence[float],
        downsample: PatchMerging | None,
        locations: Sequence[int],
        predictors: Sequence[nn.Module],
        fast_path: dict | None,
        sparse_attention: bool,
        **block_kwargs,
    ) -> None:
        super().__init__()
        self.sparse_attention = sparse_attention
        self.locations = tuple(locations)
        first_sparse = min(locations, default=depth)
        self.blocks = ModuleList(
            SwinBlock(
                embed_dims,
                shift=i % 2 == 1,
                drop_path_rate=drop_path_rates[i],
                fast_path=fast_path if i >= first_sparse else None,
                sparse_attention=sparse_attention,
                **block_kwargs,
            )
            for i in range(depth)
        )
        self.predictors = ModuleList(predictors)
        self.downsample = downsample

    def forward(
        self,
        x: Tensor,
        hw: tuple[int, int],
        decide: Decide,
        last: Decision | None,
        execution: str,
    ) -> tuple[Tensor, Decision | None]:
        """Run the blocks.

        Args:
            x: Tokens (B, N, C).
            hw: Height and width of the map.
            decide: Makes a decision.
            last: The last one that was made before, or None.
            execution: How sparse blocks are executed.

        Returns:
            The tokens, before merging, and the last decision that was made.
        """
        decision, gathers, windows = None, False, {}
        predictors = iter(self.predictors)
        for i, block in enumerate(self.blocks):
            if i in self.locations:
                decision = last = decide(x, hw, next(predictors, None), last)
                gathers = self.sparse_attention and execution != 'masked' and not decision.keeps_all
                if gathers and decision.kept is None:
                    decision = with_positions(decision)
                gathers = gathers and gathering_pays(decision, block.fast_path)
                windows = {}
            shift = block.attn.shift(hw)
            if gathers and shift not in windows:
                with region('gather'):
                    windows[shift] = block.attn.kept_rows(decision.kept, len(x), hw)
            x = block(x, hw, decision, execution, windows.get(shift))
        return x, last


@MODELS.register_module()
class SparseSwinTransformer(SparseBackbone):
    """Swin Transformer that sends a part of its tokens through the FFNs.

    Args:
        pretrain_img_size: Image size (px) of the absolute position embedding. Defaults to 224.
        in_channels: Channels of the image. Defaults to 3.
        embed_dims: Channels of the first stage. Defaults to 96.
        patch_size: Side of a patch, in px. Defaults to 4.
        window_size: Side of an attention window, in tokens. Defaults to 7.
        mlp_ratio: Hidden channels of an FFN per channel. Defaults to 4.
        depths: Blocks of each stage. Defaults to (2, 2, 6, 2).
        num_heads: Attention heads of each stage. Defaults to (3, 6, 12, 24).
        strides: Stride of the patch embedding and of each merging. Defaults to (4, 2, 2, 2).
        out_indices: Stages whose output is returned. Defaults to (0, 1, 2, 3).
        qkv_bias: Whether queries, keys and values have a bias. Defaults to True.
        qk_scale: Scale of the attention logits. Defaults to None, head_dim ** -0.5.
        patch_norm: Whether patch embedding and merging have a norm. Defaults to True.
        drop_rate: Dropout. Defaults to 0.
        attn_drop_rate: Dropout of the attention weights. Defaults to 0.
        drop_path_rate: Stochastic depth of the last block, linear in depth. Defaults to 0.1.
        use_abs_pos_embed: Whether there is an absolute position embedding; it is resized to any
            input. Defaults to False.
        act_cfg: Activation. Defaults to dict(type='GELU').
        norm_cfg: Normalization. Defaults to dict(type='LN').
        with_cp: Whether blocks recompute their activations in the backward pass, which saves
            memory. Defaults to False.
        pretrained: Deprecated, use ``init_cfg``. Defaults to None.
        convert_weights: Whether the checkpoint of ``init_cfg`` has the names of the original Swin
            repository. Defaults to False.
        frozen_stages: Stages to freeze: -1 none, 0 the patch embedding, i also the first i
            stages. Defaults to -1.
        init_cfg: None or dict(type='Pretrained', checkpoint=...). Defaults to None.
        sparsity: Where and how much the model is sparse, see
            :class:`~mmdynsparse.models.sparsity.Sparsity`; None is the dense model. Defaults to
            None.
        shift_small_maps: Whether windows are shifted on maps whose shorter side fits into one
            window: True as in mmseg and mmdet, False as in the original Swin repository. A
            checkpoint whose metadata names it overrules this. Defaults to True.

    Raises:
        ValueError: If ``sparsity``, ``strides``, ``out_indices`` or ``init_cfg`` is not valid.
    """

    original: ClassVar[str] = 'SwinTransformer'
    options = ('cell_size', 'follow', 'attention')

    def __init__(
        self,
        pretrain_img_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        embed_dims: int = 96,
        patch_size: int = 4,
        window_size: int = 7,
        mlp_ratio: float = 4,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        strides: Sequence[int] = (4, 2, 2, 2),
        out_indices: Sequence[int] = (0, 1, 2, 3),
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        patch_norm: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        use_abs_pos_embed: bool = False,
        act_cfg: dict | None = None,
        norm_cfg: dict | None = None,
        with_cp: bool = False,
        pretrained: str | None = None,
        convert_weights: bool = False,
        frozen_stages: int = -1,
        init_cfg: dict | None = None,
        sparsity: Mapping | None = None,
        shift_small_maps: bool = True,
    ) -> None:
        super().__init__(sparsity, depths, checkpoint_cfg(init_cfg, pretrained))
        if strides[0] != patch_size:
            raise ValueError(f'strides[0] must equal patch_size {patch_size}, got {strides[0]}')
        check_stages(out_indices, frozen_stages, depths, self.sparsity)
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.convert_weights = convert_weights
        self.use_abs_pos_embed = use_abs_pos_embed
        self.num_features = [embed_dims * 2**i for i in range(len(depths))]
        act_cfg = act_cfg or dict(type='GELU')
        norm_cfg = norm_cfg or dict(type='LN')
        patch_norm_cfg = norm_cfg if patch_norm else None

        self.patch_embed = PatchEmbed(in_channels, embed_dims, patch_size, patch_norm_cfg)
        if use_abs_pos_embed:
            self.pretrain_hw = tuple(s // patch_size for s in to_2tuple(pretrain_img_size))
            num_patches = self.pretrain_hw[0] * self.pretrain_hw[1]
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, num_patches, embed_dims))
        self.drop_after_pos = nn.Dropout(drop_rate)

        drop_path = torch.linspace(0, drop_path_rate, sum(depths)).tolist()
        parts = self.sparsity
        self.stages = ModuleList()
        for i, (dims, depth) in enumerate(zip(self.num_features, depths, strict=True)):
            last = i == len(depths) - 1
            stage = SwinStage(
                dims,
                depth,
                drop_path[sum(depths[:i]) : sum(depths[: i + 1])],
                None if last else PatchMerging(dims, 2 * dims, strides[i + 1], patch_norm_cfg),
                self.stage_locations(i),
                self.build_predictors(i, dims),
                parts.fast_path if parts else None,
                parts is not None and parts.attention,
                num_heads=num_heads[i],
                feedforward_channels=int(mlp_ratio * dims),
                window_size=window_size,
                drop_rate=drop_rate,
                act_cfg=act_cfg,
                norm_cfg=norm_cfg,
                with_cp=with_cp,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                attn_drop_rate=attn_drop_rate,
                shift_small_maps=shift_small_maps,
            )
            self.stages.append(stage)
        for i in self.out_indices:
            self.add_module(f'norm{i}', build_norm_layer(norm_cfg, self.num_features[i])[1])
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the maps (B, C_i, H_i, W_i) of ``out_indices`` for images (B, C, H, W).

        The tuple carries the decisions made on the way, and ``decisions`` holds them afterwards.
        """
        self.start_decisions()
        x, hw = self.patch_embed(x)
        if self.use_abs_pos_embed:
            x = x + resize_pos_embed(self.absolute_pos_embed, self.pretrain_hw, hw)
        x = self.drop_after_pos(x)
        decision = None
        outs = []
        for i in range(max(self.out_indices) + 1):
            stage = self.stages[i]
            execution = self.execution_in(stage.training)
            x, decision = stage(x, hw, partial(self._decide, i), decision, execution)
            if i in self.out_indices:
                out = getattr(self, f'norm{i}')(x)
                outs.append(out.unflatten(1, hw).permute(0, 3, 1, 2).contiguous())
            if i < max(self.out_indices):
                x, hw = stage.downsample(x, hw)
        return self.with_decisions(outs)

    def _decide(
        self,
        stage: int,
        x: Tensor,
        hw: tuple[int, int],
        predictor: nn.Module | None,
        last: Decision | None,
    ) -> Decision:
        return self.decide(x.transpose(1, 2).unflatten(2, hw), stage, predictor, last)

    def train(self, mode: bool = True) -> 'SparseSwinTransformer':
        """Set the training mode; frozen stages stay in eval mode, without gradients."""
        super().train(mode)
        self._freeze()
        return self

    def _freeze(self) -> None:
        if self.frozen_stages >= 0:
            freeze(self.patch_embed)
            self.drop_after_pos.eval()
            if self.use_abs_pos_embed:
                self.absolute_pos_embed.requires_grad = False
        for i in range(self.frozen_stages):
            freeze(self.stages[i])
            if i in self.out_indices:
                freeze(getattr(self, f'norm{i}'))
        # What no output depends on never gets a gradient, which distributed training refuses.
        last = max(self.out_indices)
        for part in (self.stages[last].downsample, *self.stages[last + 1 :]):
            if part is not None:
                part.requires_grad_(False)

    def init_weights(self) -> None:
        """Initialize as Swin does, then load the checkpoint of ``init_cfg`` if there is one."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                trunc_normal_init(m, std=0.02, bias=0.0)
            elif isinstance(m, nn.LayerNorm):
                constant_init(m, val=1.0, bias=0.0)
        if self.use_abs_pos_embed:
            trunc_normal_(self.absolute_pos_embed, std=0.02)
        if self.init_cfg is None:
            print_log(f'{type(self).__name__} starts from random weights', logger='current')
            return
        source, shift = 'swin' if self.convert_weights else 'mmdet', self.shift_small_maps
        load_pretrained(self, self.init_cfg['checkpoint'], source, may_be_new)
        # ``convert_weights`` is mmdet's, which takes the weights and shifts as it is told.
        if self.convert_weights:
            self.shift_small_maps = shift

    @property
    def shift_small_maps(self) -> bool:
        """Whether windows are shifted on maps whose shorter side fits into one window."""
        return self.stages[0].blocks[0].attn.shift_small_maps

    @shift_small_maps.setter
    def shift_small_maps(self, shift: bool) -> None:
        for m in self.modules():
            if isinstance(m, ShiftWindowMSA):
                m.shift_small_maps = shift

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args) -> None:
        """Fit a checkpoint of another window or image size."""
        if 'shift_small_maps' in local_metadata:
            self.shift_small_maps = local_metadata['shift_small_maps']
        own = {prefix + k: v for k, v in self.state_dict().items()}
        for name in [k for k in state_dict if k.startswith(prefix)]:
            if name not in own or state_dict[name].shape == own[name].shape:
                continue
            elif name.endswith('absolute_pos_embed'):
                side = int(state_dict[name].shape[1] ** 0.5)
                state_dict[name] = resize_pos_embed(
                    state_dict[name], (side, side), self.pretrain_hw
                )
            elif name.endswith('relative_position_index'):
                state_dict[name] = own[name]
            elif name.endswith('relative_position_bias_table'):
                state_dict[name] = resize_bias_table(state_dict[name], own[name].shape[0])
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, '_metadata'):
            destination._metadata[prefix[:-1]]['shift_small_maps'] = self.shift_small_maps
