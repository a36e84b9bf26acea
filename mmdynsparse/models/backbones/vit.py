"""Sparse vision transformer (DynamicViT).

Sources: Dosovitskiy et al., *An Image is Worth 16x16 Words* (arXiv 2010.11929); Rao et al.,
*DynamicViT* (NeurIPS 2021); Liu et al., *Revisiting Token Pruning for Object Detection and
Instance Segmentation* (SViT, arXiv 2306.07050) for reactivation; Li et al., *SaiT* (arXiv
2210.05832), for decisions by attention. Arguments and state-dict names are those of
``VisionTransformer`` in mmsegmentation 1.x; what is added are ``predictors.J``.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from mmcv.cnn import build_norm_layer
from mmengine.logging import print_log
from mmengine.model import ModuleList
from mmengine.model.weight_init import constant_init, kaiming_init, trunc_normal_
from mmengine.utils import to_2tuple
from torch import Tensor, nn

from ...layers import PatchEmbed
from ...ops import (
    Decision,
    TokenSubset,
    form_of,
    keep_all,
    put_tokens,
    region,
    take_tokens,
    token_subset,
)
from ...registry import MODELS
from ...utils.checkpoints import resize_pos_embed
from ..geometry import vit_geometry
from ..pruning import parse_pruning
from .pruned_blocks import block_type
from .sparse_backbone import SparseBackbone, checkpoint_cfg, output_indices
from .vit_layers import Place, TransformerEncoderLayer


@MODELS.register_module()
class SparseVisionTransformer(SparseBackbone):
    """Vision transformer whose dropped tokens leave the sequence.

    A dropped token is attended by nobody and keeps its last value, so that the maps returned are
    whole. A predictor decides among the tokens that are still kept, so keep ratios must not rise;
    with ``reactivate`` it decides among all, and a token that skipped layers may come back. An
    ``AttentionScore`` in place of a predictor decides by the attention that tokens receive in the
    layer before; a dense checkpoint then lacks nothing.

    Args:
        img_size: Image size (px) of the position embedding. Defaults to 224.
        patch_size: Side of a patch, in px. Defaults to 16.
        patch_pad: Only 'corner': images are padded at the right and the bottom. Defaults to
            'corner'.
        in_channels: Channels of the image. Defaults to 3.
        embed_dims: Channels. Defaults to 768.
        num_layers: Layers. Defaults to 12.
        num_heads: Attention heads. Defaults to 12.
        mlp_ratio: Hidden channels of an FFN per channel. Defaults to 4.
        out_origin: Whether the embedded patches are returned first. Defaults to False.
        out_indices: Layers whose output is returned, -1 for the last. Defaults to -1.
        qkv_bias: Whether the projections of the attention have a bias. Defaults to True.
        drop_rate: Dropout. Defaults to 0.
        attn_drop_rate: Dropout of the attention weights. Defaults to 0.
        drop_path_rate: Stochastic depth of the last layer, linear in depth. Defaults to 0.
        with_cls_token: Whether the class token is part of the sequence. Defaults to True.
        output_cls_token: Whether outputs are pairs of map and class token. Defaults to False.
        norm_cfg: Normalization. Defaults to dict(type='LN').
        act_cfg: Activation. Defaults to dict(type='GELU').
        patch_norm: Whether the patch embedding has a norm. Defaults to False.
        patch_bias: Whether its projection has a bias. Defaults to False.
        pre_norm: Whether there is a norm before the layers. Defaults to False.
        final_norm: Whether there is a norm after the last layer. Defaults to False.
        interpolate_mode: How the position embedding is resized. Defaults to 'bicubic'.
        num_fcs: Linear layers of an FFN. Defaults to 2.
        norm_eval: Kept for its name; layer norms do not depend on it. Defaults to False.
        with_cp: Whether layers recompute their activations in the backward pass. Defaults to
            False.
        frozen_exclude: Parts of the names of parameters that learn; 'all' for all. Defaults to
            ('all',).
        pretrained: Deprecated, use ``init_cfg``. Defaults to None.
        init_cfg: None or dict(type='Pretrained', checkpoint=...). Defaults to None.
        sparsity: See :class:`~mmdynsparse.models.sparsity.Sparsity`, without ``fast_path``; all
            layers are stage 0, the schedule defaults to 'power' and the locations to a quarter,
            half and three quarters of the depth. None is the dense model. Defaults to None.
        reactivate: See above. Defaults to False.
        pruning: What is left of attentions and FFNs, or that gates search for it, see
            :class:`~mmdynsparse.models.pruning.Pruning`; all layers are stage 0. Defaults to None,
            all.

    Raises:
        ValueError: If an argument is outside its range.
    """

    original = 'VisionTransformer'
    source = 'mmseg'
    executions = ('gather', 'masked')
    options = ()
    # Modules in whose place a subclass has others.
    patch_embed_type: ClassVar[type[PatchEmbed]] = PatchEmbed
    layer_type: ClassVar[type[TransformerEncoderLayer]] = TransformerEncoderLayer

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        patch_pad: str = 'corner',
        in_channels: int = 3,
        embed_dims: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        mlp_ratio: int = 4,
        out_origin: bool = False,
        out_indices: int | Sequence[int] = -1,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        with_cls_token: bool = True,
        output_cls_token: bool = False,
        norm_cfg: dict | None = None,
        act_cfg: dict | None = None,
        patch_norm: bool = False,
        patch_bias: bool = False,
        pre_norm: bool = False,
        final_norm: bool = False,
        interpolate_mode: str = 'bicubic',
        num_fcs: int = 2,
        norm_eval: bool = False,
        with_cp: bool = False,
        frozen_exclude: Sequence[str] = ('all',),
        pretrained: str | None = None,
        init_cfg: dict | None = None,
        sparsity: Mapping | None = None,
        reactivate: bool = False,
        pruning: Mapping | None = None,
    ) -> None:
        cfg, defaults = checkpoint_cfg(init_cfg, pretrained), sparse_defaults(num_layers)
        super().__init__(sparsity, (num_layers,), cfg, falling=not reactivate, **defaults)
        self.reactivate = reactivate
        self.out_indices = output_indices(out_indices, -1, num_layers)
        self.out_origin = out_origin
        self.with_cls_token, self.output_cls_token = with_cls_token, output_cls_token
        self.interpolate_mode = interpolate_mode
        self.frozen_exclude = tuple(frozen_exclude)
        sizes = (in_channels, embed_dims, patch_size, mlp_ratio, num_layers, num_heads)
        self.geometry = vit_geometry(*sizes, self.out_indices, with_cls_token)
        self.pruning = parse_pruning(pruning, self.geometry, self.sparsity, alpha=0.01)
        self.pos_hw = tuple(s // patch_size for s in to_2tuple(img_size))
        self._check(patch_pad, num_fcs)
        norm_cfg, patch = norm_cfg or dict(type='LN'), (in_channels, embed_dims, patch_size)
        self._build_embedding(patch, norm_cfg if patch_norm else None, patch_bias, drop_rate)
        self.ln_pre = build_norm_layer(norm_cfg, embed_dims)[1] if pre_norm else None
        args = (embed_dims, num_heads, mlp_ratio * embed_dims, norm_cfg, qkv_bias, drop_rate)
        rates = torch.linspace(0, drop_path_rate, num_layers).tolist()
        rest = (act_cfg or dict(type='GELU'), num_fcs, with_cp)
        types = [block_type(self.layer_type, self.pruning, 0, i) for i in range(num_layers)]
        layers = [t(*args, attn_drop_rate, *r, *rest) for t, *r in zip(types, rates, strict=True)]
        self.layers = ModuleList(layers)
        self.ln1 = build_norm_layer(norm_cfg, embed_dims)[1] if final_norm else None
        self.predictors = ModuleList(self.build_predictors(0, embed_dims))
        self._freeze()

    def _build_embedding(
        self, patch: tuple[int, int, int], norm_cfg: dict | None, bias: bool, drop_rate: float
    ) -> None:
        embed_dims, num_patches = patch[1], self.pos_hw[0] * self.pos_hw[1]
        self.patch_embed = self.patch_embed_type(*patch, norm_cfg, bias=bias)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dims))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches + 1, embed_dims))
        self.drop_after_pos = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> tuple:
        """Return the maps (B, C, H, W) of ``out_indices`` for images (B, C, H, W).

        With ``output_cls_token`` each is a list of the map and the class token (B, C). The tuple
        carries the decisions made on the way, and ``decisions`` holds them afterwards.
        """
        whole, hw = self._embed(x)
        outs = [self._output(whole, hw)] if self.out_origin else []
        locations, decisions = self.stage_locations(0), []
        tokens, subset, policy, received = whole, None, None, None
        for i in range(max(self.out_indices) + 1):
            if i in locations:
                whole = tokens if subset is None else put_tokens(whole, tokens, subset)
                index = locations.index(i)
                decisions.append(self._decide(whole, hw, index, decisions, subset, received))
                tokens, subset, policy = self._drop(whole, decisions[-1])
            place = Place(hw, whole, subset)
            tokens, received = self._run_layer(i, tokens, policy, place)
            if i in self.out_indices:
                out = tokens if subset is None else put_tokens(whole, tokens, subset)
                last = i == len(self.layers) - 1
                outs.append(self._output(self.ln1(out) if last and self.ln1 else out, hw))
        return self._finish(outs, decisions)

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x, hw = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        cls_pos, pos = self.pos_embed.split((1, self.pos_embed.shape[1] - 1), dim=1)
        pos = resize_pos_embed(pos, self.pos_hw, hw, self.interpolate_mode)
        x = self.drop_after_pos(x + torch.cat((cls_pos, pos), dim=1))
        x = x if self.with_cls_token else x[:, 1:]
        return (x if self.ln_pre is None else self.ln_pre(x)), hw

    def _decide(
        self,
        whole_BTC: Tensor,
        hw: tuple[int, int],
        index: int,
        decisions: Sequence[Decision],
        subset: TokenSubset | None,
        received_BT: Tensor | None,
    ) -> Decision:
        """Decide among the tokens that are still kept, or with ``reactivate`` among all."""
        if received_BT is None and self.decider.keeps_all(index, learns=self.training):
            return keep_all(len(whole_BTC), hw, whole_BTC.device)
        among_BN = decisions[index - 1].mask if index and not self.reactivate else None
        with region('predictor'):
            seen = whole_BTC.detach() if received_BT is None else received_BT
            log_probs = self._score(seen, self.predictors[index], among_BN, subset)
        return self.decider.decide(
            log_probs, hw, index=index, sample=self.training, among_BN=among_BN
        )

    def _run_layer(
        self, i: int, tokens_BTC: Tensor, policy_BT: Tensor | None, place: Place
    ) -> tuple[Tensor, Tensor | None]:
        """Return the tokens after a layer, and what they receive where a decision reads that.

        In training it is read at keep ratio 1 as well, for what is distilled.
        """
        locations, queries = self.stage_locations(0), None
        if self.decider.reads == 'attention' and i + 1 in locations:
            index = locations.index(i + 1)
            if self.training or not self.decider.keeps_all(index):
                queries = self.predictors[index].queries
        if tokens_BTC.shape[1] == 0:
            return tokens_BTC, None if queries is None else tokens_BTC[..., 0]
        valid_BT = None if place.subset is None else place.subset.valid
        out = self.layers[i](tokens_BTC, policy_BT, valid_BT, queries, place)
        return (out, None) if queries is None else out

    def _drop(
        self, whole_BTC: Tensor, decision: Decision
    ) -> tuple[Tensor, TokenSubset | None, Tensor | None]:
        """Return the tokens that go on after a decision, with their places or their policy."""
        learns = self.training and self.decider.learns
        form = form_of(decision, self.execution, learns)
        if form == 'dense':
            return whole_BTC, None, None
        # The class token is always kept.
        first = int(self.with_cls_token)
        mask_BT = nn.functional.pad(decision.mask, (first, 0), value=1.0)
        if form == 'masked':
            return whole_BTC, None, mask_BT
        count = None if decision.count is None else decision.count + first
        subset = token_subset(mask_BT.detach(), count)
        return take_tokens(whole_BTC, subset), subset, None

    def _score(
        self,
        seen: Tensor,
        predictor: nn.Module,
        among_BN: Tensor | None,
        subset: TokenSubset | None,
    ) -> Tensor:
        """Return log-probabilities (B, N, 2); dropped tokens may be left at -inf.

        A predictor sees all tokens (B, T, C), or what those of the subset receive, (B, T).
        """
        first = int(self.with_cls_token)
        seen = seen[:, first:]
        if among_BN is None or subset is None:
            return predictor(seen, among_BN)
        valid = None if subset.valid is None else subset.valid[:, first:]
        subset = TokenSubset(subset.positions[:, first:] - first, valid)
        log_probs = predictor(take_tokens(seen, subset) if seen.ndim == 3 else seen, valid)
        out = log_probs.new_full((*among_BN.shape, 2), -torch.inf)
        return put_tokens(out, log_probs, subset)

    def _output(self, x_BTC: Tensor, hw: tuple[int, int]) -> Tensor | list[Tensor]:
        tokens = x_BTC[:, 1:] if self.with_cls_token else x_BTC
        out = tokens.transpose(1, 2).unflatten(2, hw).contiguous()
        return [out, x_BTC[:, 0]] if self.output_cls_token else out

    def _init_parameters(self) -> None:
        trunc_normal_(self.pos_embed, std=0.02)
        trunc_normal_(self.cls_token, std=0.02)
        for name, m in self.named_modules():
            if isinstance(m, nn.Linear):
                trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.normal_(m.bias, std=1e-6 if 'ffn' in name else 0.0)
            elif isinstance(m, nn.Conv2d):
                kaiming_init(m, mode='fan_in', bias=0.0)
            elif isinstance(m, nn.LayerNorm):
                constant_init(m, val=1.0, bias=0.0)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """Fit the position embedding of another image size, and leave out unused parameters.

        mmseg's configs load classification checkpoints into models without their final norm and
        the bias of the patch embedding.
        """
        own = {prefix + name for name, _ in self.named_parameters()}
        for name in ('ln1.weight', 'ln1.bias', 'patch_embed.projection.bias'):
            if prefix + name in state_dict and prefix + name not in own:
                print_log(f'{name} of the checkpoint is not used', 'current', logging.WARNING)
                del state_dict[prefix + name]
        name = prefix + 'pos_embed'
        if name in state_dict and state_dict[name].shape != self.pos_embed.shape:
            cls_pos, pos = state_dict[name][:, :1], state_dict[name][:, 1:]
            side = int(pos.shape[1] ** 0.5)
            pos = resize_pos_embed(pos, (side, side), self.pos_hw, self.interpolate_mode)
            state_dict[name] = torch.cat((cls_pos, pos), dim=1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _freeze(self) -> None:
        exclude = self.frozen_exclude
        for name, p in self.named_parameters():
            p.requires_grad = 'all' in exclude or any(part in name for part in exclude)
        # What no output depends on never gets a gradient, which distributed training refuses.
        last = max(self.out_indices)
        unused = [*self.layers[last + 1 :], self.ln1 if last < len(self.layers) - 1 else None]
        for part in unused:
            if part is not None:
                part.requires_grad_(False)

    def _check(self, patch_pad: str, num_fcs: int) -> None:
        if patch_pad != 'corner':
            raise ValueError(f"patch_pad must be 'corner', got {patch_pad!r}")
        if self.pruning is not None and num_fcs != 2:
            raise ValueError(f'num_fcs must be 2 with pruning, got {num_fcs}')
        if self.output_cls_token and not self.with_cls_token:
            raise ValueError('output_cls_token needs with_cls_token, got with_cls_token=False')
        if self.sparsity is None:
            return
        if self.sparsity.fast_path is not None:
            raise ValueError(
                'sparsity.fast_path must be None: dropped tokens leave the sequence, got '
                f'{self.sparsity.fast_path}'
            )
        if self.decider.reads == 'attention':
            self._check_attention()
        if max(self.stage_locations(0)) > max(self.out_indices):
            raise ValueError(
                f'sparsity.locations[0] takes layers up to the last output, '
                f'{max(self.out_indices)}, got {self.stage_locations(0)}'
            )

    def _check_attention(self) -> None:
        read = [i - 1 for i in self.stage_locations(0)]
        others = [] if self.pruning is None else [self.pruning.mixers[0][i] for i in read]
        if set(others) - {'msa'}:
            raise ValueError(
                f"pruning.mixers must be 'msa' in the layers {read}, whose attention an "
                f'AttentionScore reads, got {others}'
            )
        if self.stage_locations(0)[0] < 1:
            raise ValueError(
                'sparsity.locations[0] takes layers from 1 on with an AttentionScore, which reads '
                f'the layer before, got {self.stage_locations(0)}'
            )
        if not self.with_cls_token and self.sparsity.predictor.get('queries') == 'cls':
            raise ValueError(
                "queries of an AttentionScore must be 'mean' without a class token, got 'cls' and "
                'with_cls_token=False'
            )


def sparse_defaults(num_layers: int) -> dict:
    """Return the defaults of ``sparsity`` for a number of layers."""
    quarters = tuple(num_layers * i // 4 for i in (1, 2, 3))
    return dict(locations={0: quarters}, schedule='power', fast_path=None)
