"""Distillation of importance: which tokens the layers before a decision should attend to.

Source: Li et al., *SaiT* (arXiv 2210.05832), for the idea that a teacher improves how early layers
select tokens. The formulas, and the entropy as a target, are our own. Dimension letters: B images,
N patch tokens.
"""

import math
from collections.abc import Mapping, Sequence
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import received_attention
from ..ops import Decision
from .distillation import SEGMENTOR, has_logit_map

# What the teacher says about the importance of tokens: the attention that they receive in its last
# layer, of all tokens or of the class token, or the entropy of its pixels.
TARGETS = ('mean', 'cls', 'entropy')


def parse_importance(value: Mapping | None) -> tuple[float, str] | None:
    """Return weight and target of the distillation of importance, None without.

    Args:
        value: What a config has: None, or a dict of ``weight``, by default 1, and ``target``, by
            default 'mean'.

    Raises:
        ValueError: If the weight is below 0 or the target is none of ``TARGETS``.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping) or not set(value) <= {'weight', 'target'}:
        raise ValueError(f'importance must be None or dict(weight=..., target=...), got {value!r}')
    weight, target = value.get('weight', 1.0), value.get('target', 'mean')
    if not isinstance(weight, Real) or not weight >= 0:
        raise ValueError(f'importance.weight must be at least 0, got {weight!r}')
    if target not in TARGETS:
        raise ValueError(f'importance.target must be one of {TARGETS}, got {target!r}')
    return (float(weight), target) if weight else None


def importance_source(student: nn.Module, teacher: nn.Module, target: str) -> str:
    """Return the name of the teacher's module from whose output the target is computed.

    Raises:
        ValueError: If the student's tokens are not scored by attention, or the teacher has no such
            module.
    """
    decider = getattr(student.backbone, 'decider', None)
    if getattr(decider, 'reads', None) != 'attention':
        raise ValueError(
            'importance needs a SparseVisionTransformer with sparsity.predictor '
            "dict(type='mmdynsparse.AttentionScore') as backbone, got a "
            f'{type(student.backbone).__name__} without'
        )
    if target == 'entropy':
        if not has_logit_map(teacher):
            raise ValueError(
                "importance.target 'entropy' needs a segmentor with one decode_head that returns "
                f"a map of logits, got {type(teacher).__name__}: take 'mean' or 'cls'"
            )
        return SEGMENTOR
    backbone, last = teacher.backbone, max(getattr(teacher.backbone, 'out_indices', (0,)))
    name = f'backbone.layers.{last}.ln1'
    if name not in dict(teacher.named_modules()) or not hasattr(backbone, 'with_cls_token'):
        raise ValueError(
            f'importance.target {target!r} needs a teacher with a VisionTransformer as backbone, '
            f'got a {type(backbone).__name__}'
        )
    if target == 'cls' and not backbone.with_cls_token:
        raise ValueError(
            "importance.target 'cls' needs a teacher with a class token, got with_cls_token=False"
        )
    return name


def importance_target(backbone: nn.Module, target: str, out: Tensor, hw: tuple[int, int]) -> Tensor:
    """Return the share of each token in the importance of an image, (B, N), by the teacher.

    Args:
        backbone: The teacher's.
        target: One of ``TARGETS``.
        out: Output of the teacher's ``importance_source``.
        hw: Height and width of the student's map, in tokens.
    """
    if target == 'entropy':
        if out.shape[1] == 1:
            out = torch.cat((out, torch.zeros_like(out)), 1)
        entropy = torch.special.entr(out.float().softmax(1)).sum(1, keepdim=True)
        # Above 0, so that no token is ruled out.
        importance_BN = F.adaptive_avg_pool2d(entropy, hw).flatten(1) + 1e-3
    else:
        attn = backbone.layers[max(backbone.out_indices)].attn.attn
        importance_BN = received_attention(attn, out, target)[:, int(backbone.with_cls_token) :]
    return importance_BN / importance_BN.sum(1, keepdim=True)


def importance_loss(decisions: Sequence[Decision], target_BN: Tensor) -> Tensor:
    """Divergence KL(target || score) of the tokens' importance, divided by log N.

    It is a mean over decisions, each with the target of the tokens that are still there.

    Args:
        decisions: Those of the student, with scores log s of shares s, -inf for dropped tokens.
        target_BN: Shares of the tokens, by the teacher.

    Raises:
        ValueError: If there are not as many tokens.
    """
    losses = []
    for decision in decisions:
        scores_BN = decision.scores
        if scores_BN.shape != target_BN.shape:
            raise ValueError(
                'importance needs a teacher with as many tokens as the student, '
                f'{scores_BN.shape[1]}, got {target_BN.shape[1]}'
            )
        present_BN = scores_BN > -torch.inf
        share_BN = target_BN * present_BN
        share_BN = share_BN / share_BN.sum(1, keepdim=True).clamp(min=1e-12)
        cross_BN = share_BN * scores_BN.masked_fill(~present_BN, 0.0)
        losses.append((torch.xlogy(share_BN, share_BN) - cross_BN).sum(1).mean())
    return torch.stack(losses).mean() / math.log(max(target_BN.shape[1], 2))
