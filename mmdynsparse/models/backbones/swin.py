"""Sparse Swin Transformer.

Sources: Liu et al., *Swin Transformer* (arXiv 2103.14030); Rao et al., *Dynamic Spatial
Sparsification* (T-PAMI 2023, arXiv 2207.01580). Arguments and state-dict names are those of
``SwinTransformer`` in mmsegmentation 1.x and mmdetection 3.x; what is added are predictors
(``stages.I.predictors.J``) and fast paths (``stages.I.blocks.K.fast_path``).
"""

import math
from collections.abc import Mapping, Sequence

import torch
from mmcv.cnn import build_norm_layer
from mmengine.model import ModuleList
from mmengine.model.weight_init import constant_init, trunc_normal_, trunc_normal_init
from mmengine.utils import to_2tuple
from torch import Tensor, nn

from ...layers import PatchEmbed, PatchMerging, ShiftWindowMSA
from ...ops import Plan
from ...registry import MODELS
from ...utils.checkpoints import resize_bias_table, resize_pos_embed
from ..geometry import swin_geometry
from ..pruning import parse_pruning
from .pruned_blocks import block_type
from .sparse_backbone import StagedBackbone, checkpoint_cfg
from .swin_blocks import SwinBlock, SwinStage


@MODELS.register_module()
class SparseSwinTransformer(StagedBackbone):
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
        pruning: What is left of attentions and FFNs, or that gates search for it, see
            :class:`~mmdynsparse.models.pruning.Pruning`. Defaults to None, all.

    Raises:
        ValueError: If ``sparsity``, ``pruning``, ``strides``, ``out_indices`` or ``init_cfg`` is
            not valid.
    """

    original = 'SwinTransformer'
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
        pruning: Mapping | None = None,
    ) -> None:
        base = (depths, out_indices, frozen_stages, checkpoint_cfg(init_cfg, pretrained))
        super().__init__(sparsity, *base)
        if strides[0] != patch_size:
            raise ValueError(f'strides[0] must equal patch_size {patch_size}, got {strides[0]}')
        sizes = (in_channels, embed_dims, window_size, mlp_ratio, depths, num_heads, strides)
        self.geometry = swin_geometry(*sizes, self.out_indices)
        self.pruning = parse_pruning(pruning, self.geometry, self.sparsity, alpha=100.0)
        self.convert_weights, self.use_abs_pos_embed = convert_weights, use_abs_pos_embed
        self.source = 'swin' if convert_weights else 'mmdet'
        self.num_features = [embed_dims * 2**i for i in range(len(depths))]
        act_cfg, norm_cfg = act_cfg or dict(type='GELU'), norm_cfg or dict(type='LN')
        patch_norm_cfg = norm_cfg if patch_norm else None
        self.patch_embed = PatchEmbed(in_channels, embed_dims, patch_size, patch_norm_cfg)
        if use_abs_pos_embed:
            self._add_position(pretrain_img_size, patch_size)
        self.drop_after_pos = nn.Dropout(drop_rate)
        attention = dict(window_size=window_size, qkv_bias=qkv_bias, qk_scale=qk_scale)
        attention |= dict(attn_drop_rate=attn_drop_rate, shift_small_maps=shift_small_maps)
        self._shift_small_maps = shift_small_maps
        block = dict(drop_rate=drop_rate, act_cfg=act_cfg, norm_cfg=norm_cfg, with_cp=with_cp)
        rates = torch.linspace(0, drop_path_rate, sum(depths)).split(tuple(depths))
        self.stages = ModuleList()
        for i, dims in enumerate(self.num_features):
            own = dict(num_heads=num_heads[i], feedforward_channels=self.geometry.widths[i])
            stage = self._build_stage(i, dims, rates[i].tolist(), **own, **block, **attention)
            if i < len(depths) - 1:
                stage.downsample = PatchMerging(dims, 2 * dims, strides[i + 1], patch_norm_cfg)
            self.stages.append(stage)
        self._add_norms(norm_cfg)
        self._freeze()

    def _add_position(self, img_size: int | tuple[int, int], patch_size: int) -> None:
        self.pretrain_hw = tuple(s // patch_size for s in to_2tuple(img_size))
        position_1NC = torch.zeros(1, math.prod(self.pretrain_hw), self.num_features[0])
        self.absolute_pos_embed = nn.Parameter(position_1NC)

    def _add_norms(self, norm_cfg: dict) -> None:
        for i in self.out_indices:
            self.add_module(f'norm{i}', build_norm_layer(norm_cfg, self.num_features[i])[1])

    def _build_stage(
        self, i: int, dims: int, drop_path_rates: Sequence[float], **block_kwargs
    ) -> SwinStage:
        blocks = [
            block_type(SwinBlock, self.pruning, i, j)(
                dims,
                shift=j % 2 == 1,
                drop_path_rate=rate,
                fast_path=self.fast_path_cfg(i, j),
                sparse_attention=self.sparse_attention,
                **block_kwargs,
            )
            for j, rate in enumerate(drop_path_rates)
        ]
        return SwinStage(blocks, self.build_predictors(i, dims))

    @property
    def sparse_attention(self) -> bool:
        """Whether window attention, too, updates kept tokens only."""
        return self.sparsity is not None and self.sparsity.attention

    @property
    def gathers_in_training(self) -> bool:
        """Whether blocks may be gathered in training: stochastic depth asks for all windows."""
        return not self.sparse_attention

    def _stem(self, x: Tensor) -> Tensor:
        x, hw = self.patch_embed(x)
        if self.use_abs_pos_embed:
            x = x + resize_pos_embed(self.absolute_pos_embed, self.pretrain_hw, hw)
        return _map(self.drop_after_pos(x), hw)

    def _downsample(self, x: Tensor, stage: int) -> Tensor:
        return _map(*self.stages[stage - 1].downsample(_tokens(x), tuple(x.shape[2:])))

    def _run_blocks(self, x: Tensor, blocks: Sequence[SwinBlock], plan: Plan) -> Tensor:
        hw, x, found = tuple(x.shape[2:]), _tokens(x), {}
        for block in blocks:
            x = block(x, hw, plan, block.find_rows(plan, x.shape[0], hw, found))
        return _map(x, hw)

    def _output(self, x: Tensor, stage: int) -> Tensor:
        norm = getattr(self, f'norm{stage}')
        return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()

    def _blocks(self, stage: int) -> Sequence[SwinBlock]:
        return list(self.stages[stage].blocks)

    def _predictors(self, stage: int) -> Sequence[nn.Module]:
        return self.stages[stage].predictors

    def _stem_parts(self) -> Sequence[nn.Module | nn.Parameter]:
        position = (self.absolute_pos_embed,) if self.use_abs_pos_embed else ()
        return (self.patch_embed, self.drop_after_pos, *position)

    def _stage_parts(self, stage: int) -> Sequence[nn.Module]:
        norms = (getattr(self, f'norm{stage}'),) if stage in self.out_indices else ()
        return (self.stages[stage], *norms)

    def _unused_parts(self) -> Sequence[nn.Module]:
        merging = self.stages[max(self.out_indices)].downsample
        return [*super()._unused_parts(), *((merging,) if merging is not None else ())]

    def _init_parameters(self) -> None:
        for m in self.modules():
            if isinstance(m, nn.Linear):
                trunc_normal_init(m, std=0.02, bias=0.0)
            elif isinstance(m, nn.LayerNorm):
                constant_init(m, val=1.0, bias=0.0)
        if self.use_abs_pos_embed:
            trunc_normal_(self.absolute_pos_embed, std=0.02)

    def init_weights(self) -> None:
        """Initialize as Swin does, then load the checkpoint of ``init_cfg`` if there is one."""
        shift = self.shift_small_maps
        super().init_weights()
        # ``convert_weights`` is mmdet's, which takes the weights and shifts as it is told.
        if self.convert_weights:
            self.shift_small_maps = shift

    @property
    def shift_small_maps(self) -> bool:
        """Whether windows are shifted on maps whose shorter side fits into one window."""
        return self._shift_small_maps

    @shift_small_maps.setter
    def shift_small_maps(self, shift: bool) -> None:
        self._shift_small_maps = shift
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


def _tokens(x_BCHW: Tensor) -> Tensor:
    """Return the tokens (B, N, C) of a map, a view where it is channels last in memory."""
    return x_BCHW.flatten(2).transpose(1, 2)


def _map(x_BNC: Tensor, hw: tuple[int, int]) -> Tensor:
    """Return the map (B, C, H, W) of tokens, a view that is channels last in memory."""
    return x_BNC.transpose(1, 2).unflatten(2, hw)
