"""The weights of a pruned model, from those of a search (SPViT).

Source: He et al., *Pruning Self-attentions into Convolutional Layers in Single Path* (arXiv
2111.11802). The published models mix the heads of their kernels in every forward, also after the
search; here they are mixed once, which is the same function at the start of the fine-tuning.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops import chosen_mixer, open_gates
from .convert import shorten
from .layouts.common import fold_heads
from .weights import is_new

GATES = '.attn.gate_logits'
# Names of the joint projection and of the output projection, within an attention.
PROJECTIONS = (('w_msa.qkv.', 'w_msa.proj.'), ('attn.in_proj_', 'attn.out_proj.'))
BATCH_NORM = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')


class Pruned(NamedTuple):
    """State dict and architecture of a pruned model.

    Attributes:
        state_dict: For a model with ``pruning=dict(mixers=..., hidden=...)``.
        mixers: As of ``Pruning``, in lists.
        hidden: As of ``Pruning``, in lists.
    """

    state_dict: dict[str, Tensor]
    mixers: list[list[str]]
    hidden: list[list[int]]


def prune_state_dict(
    searched: Mapping[str, Tensor], alpha: float, original: Mapping[str, Tensor] | None = None
) -> Pruned:
    """Keep what the gates of a searched model have chosen.

    Args:
        searched: State dict of the searched model or of its backbone.
        alpha: That of the search.
        original: State dict of the dense model that the search started from. Its weights are taken
            where it has them; the convolutions then have uniform shares of the heads and fresh
            norms, as published. Defaults to None, the searched weights.

    Raises:
        ValueError: If there are no gates, or ``original`` does not fit.
    """
    blocks = sorted((k.removesuffix(GATES) for k in searched if k.endswith(GATES)), key=_numbers)
    if not blocks:
        raise ValueError(
            f'checkpoint must be of a search, with names that end in {GATES!r}, got '
            f'{shorten(list(searched))}'
        )
    base = dict(searched)
    if original is not None:
        base = _replace_weights(base, original, blocks)
    out = OrderedDict((k, v) for k, v in base.items() if not _block_of(k, blocks))
    mixers, hidden = {}, {}
    for block in blocks:
        part = {k[len(block) + 1 :]: v for k, v in base.items() if k.startswith(f'{block}.')}
        mixer = chosen_mixer(part['attn.gate_logits'])
        units = open_gates(part['ffn.gate_logits']).nonzero().squeeze(1)
        kept = _prune_attention(part, mixer, alpha) | _prune_ffn(part, units)
        out.update((f'{block}.{name}', value) for name, value in kept.items())
        stage = _numbers(block)[:-1]
        mixers.setdefault(stage, []).append(mixer)
        hidden.setdefault(stage, []).append(len(units))
    # A state dict has its metadata as an attribute.
    out._metadata = getattr(searched, '_metadata', OrderedDict())
    return Pruned(out, list(mixers.values()), list(hidden.values()))


def architecture_of(state_dict: dict[str, Tensor]) -> Pruned:
    """Return a pruned backbone's state dict with the architecture that its names and shapes tell.

    Args:
        state_dict: Of a pruned backbone, in our names.

    Raises:
        ValueError: If it has no FFNs.
    """
    last = '.ffn.layers.1.weight'
    blocks = sorted((k.removesuffix(last) for k in state_dict if k.endswith(last)), key=_numbers)
    if not blocks:
        raise ValueError(f'checkpoint must have names that end in {last!r}, got none')
    mixers, hidden = {}, {}
    for block in blocks:
        weight = state_dict.get(f'{block}.attn.reduce.weight')
        has_attention = any(k.startswith(f'{block}.attn.') for k in state_dict)
        mixer = 'msa' if has_attention else 'none'
        mixer = mixer if weight is None else 'conv1' if weight.shape[-1] == 1 else 'conv3'
        stage = _numbers(block)[:-1]
        mixers.setdefault(stage, []).append(mixer)
        hidden.setdefault(stage, []).append(state_dict[block + last].shape[1])
    return Pruned(state_dict, list(mixers.values()), list(hidden.values()))


def _prune_attention(part: Mapping[str, Tensor], mixer: str, alpha: float) -> dict[str, Tensor]:
    """Return what is left of a block but for its FFN."""
    out = {k: v for k, v in part.items() if not k.startswith(('attn.', 'ffn.'))}
    if mixer == 'none':
        return {k: v for k, v in out.items() if not re.match(r'(norm|ln)1\.', k)}
    if mixer == 'msa':
        return out | {k: v for k, v in part.items() if k.startswith('attn.') and not is_new(k)}
    size = 1 if mixer == 'conv1' else 3
    joint, proj = next(names for names in PROJECTIONS if f'attn.{names[0]}weight' in part)
    names = dict(value=f'{joint}weight', value_bias=f'{joint}bias')
    names |= dict(output=f'{proj}weight', output_bias=f'{proj}bias')
    attn = {key: part.get(f'attn.{name}') for key, name in names.items()}
    for key in ('value', 'value_bias'):
        attn[key] = None if attn[key] is None else attn[key].chunk(3)[2]
    folded = fold_heads(attn, part['attn.head_logits'], alpha, size)
    folded |= {f'norm.{k}': part[f'attn.mix_norm{size}.{k}'] for k in BATCH_NORM}
    return out | {f'attn.{k}': v for k, v in folded.items()}


def _prune_ffn(part: Mapping[str, Tensor], units: Tensor) -> dict[str, Tensor]:
    first, last = 'ffn.layers.0.0.', 'ffn.layers.1.'
    return {
        f'{first}weight': part[f'{first}weight'].index_select(0, units),
        f'{first}bias': part[f'{first}bias'].index_select(0, units),
        f'{last}weight': part[f'{last}weight'].index_select(1, units),
        f'{last}bias': part[f'{last}bias'],
    }


def _replace_weights(
    searched: dict[str, Tensor], original: Mapping[str, Tensor], blocks: list[str]
) -> dict[str, Tensor]:
    """Take the original's weights; shares of heads and norms of convolutions start afresh."""
    prefix = re.match(r'(.*?)(stages|layers)\.', blocks[0])[1]
    if prefix and not any(name.startswith(prefix) for name in original):
        original = {prefix + name: value for name, value in original.items()}
    out = {}
    for name, value in searched.items():
        theirs = original.get(name)
        if is_new(name) and not name.endswith('.gate_logits'):
            is_one = name.endswith(('.head_logits', '.weight', '.running_var'))
            out[name] = torch.full_like(value, int(is_one))
        elif theirs is not None and theirs.shape == value.shape:
            out[name] = theirs
        elif _block_of(name, blocks) and not is_new(name) and not name.endswith('_index'):
            got = 'none' if theirs is None else f'one of shape {tuple(theirs.shape)}'
            raise ValueError(
                f'--original must hold {name} of shape {tuple(value.shape)}, got {got}'
            )
        else:
            out[name] = value
    return out


def _block_of(name: str, blocks: list[str]) -> bool:
    """Whether a tensor belongs to one of the blocks with gates."""
    match = re.match(r'(.*?(?:stages\.\d+\.blocks|layers)\.\d+)\.', name)
    return match is not None and match[1] in blocks


def _numbers(name: str) -> tuple[int, ...]:
    """Return the numbers of stage and block in a block's name."""
    return tuple(int(n) for n in re.findall(r'\d+', name))
