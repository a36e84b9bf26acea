"""Names of the published SPViT (ziplab/SPViT), on Swin and on DeiT.

Their attentions have queries and keys apart from the values. Fine-tuned blocks with a convolution
keep the attention's projections and the logits of the head shares, from which they make the kernels
in every forward; here these are mixed once. What a skipped block or a class token gets in the
fine-tuned models is ``norm_identity`` of our ``pruning``.
"""

import re
from collections import OrderedDict

import torch
from torch import Tensor

from . import swin, vit
from .common import StateDict, fold_heads

# Divides the logits of the head shares.
ALPHAS = dict(swin=100.0, deit=0.01)
# For each of our positions, row by row, theirs: column by column, or with the centre first.
SLOTS = dict(
    deit=[0, 3, 6, 1, 4, 7, 2, 5, 8],
    swin=[1, 4, 6, 2, 0, 7, 3, 5, 8],
)
GATES = (
    (r'\.attn\.kernel_thresholds(_full)?$', '.attn.gate_logits'),
    (r'\.mlp\.ffn_thresholds$', '.ffn.gate_logits'),
    (r'\.attn\.bn_(\d)x\d\.', r'.attn.mix_norm\1.'),
)
FOLDED = {'attn.bconv.0.': 'attn.reduce.', 'attn.bconv.1.': 'attn.norm.'}
FOLDED |= {'attn.bconv.3.': 'attn.expand.'}


def from_swin(tensors: StateDict) -> StateDict:
    """Convert the names of SPViT on Swin, of a search or of a fine-tuned model."""
    blocks, rest = _convert_blocks(tensors, 'swin')
    out = swin.from_original(rest)
    metadata = out._metadata
    for name, value in blocks.items():
        out[re.sub(r'^layers\.', 'stages.', name)] = value
    return _finish(out, metadata, tensors)


def from_deit(tensors: StateDict) -> StateDict:
    """Convert the names of SPViT on DeiT, of a search or of a fine-tuned model, or folded ones."""
    blocks, rest = _convert_blocks(tensors, 'deit')
    out = vit.from_timm(rest)
    for name, value in blocks.items():
        out[re.sub(r'^blocks\.', 'layers.', name)] = value
    return _finish(out, OrderedDict({'': {'version': 1}}), tensors)


def _finish(out: dict, metadata: dict, tensors: StateDict) -> StateDict:
    is_search = any(name.endswith('.mlp.ffn_thresholds') for name in tensors)
    if not is_search:
        metadata['']['norm_identity'] = True
    out._metadata = metadata
    return out


def _convert_blocks(tensors: StateDict, family: str) -> tuple[dict, dict]:
    """Return what only SPViT has, in our names within blocks, and the rest in dense names."""
    blocks, rest = {}, OrderedDict()
    is_search = any(name.endswith('.mlp.ffn_thresholds') for name in tensors)
    for name, value in tensors.items():
        prefix = name.split('.attn.')[0]
        has_keys = f'{prefix}.attn.qk.weight' in tensors
        if name.endswith('.assigned_indicator_index'):
            continue
        elif '.attn.bconv.' in name:
            theirs = next(part for part in FOLDED if part in name)
            blocks[name.replace(theirs, FOLDED[theirs])] = value
        elif '.attn.qk.' in name:
            both = torch.cat((value, tensors[name.replace('.qk.', '.v.')]))
            rest[name.replace('.qk.', '.qkv.')] = both
        elif name.endswith('.attn.head_probs') and is_search:
            blocks[f'{prefix}.attn.head_logits'] = value[:, SLOTS[family]]
        elif name.endswith('.attn.head_probs'):
            blocks.update(_fold(tensors, prefix, family))
        elif '.attn.v.' in name or ('.attn.' in name and not has_keys):
            continue
        elif (ours := _gate_name(name)) != name:
            blocks[ours] = value
        else:
            rest[name] = value
    return blocks, rest


def _gate_name(name: str) -> str:
    for pattern, ours in GATES:
        name = re.sub(pattern, ours, name)
    return name


def _fold(tensors: StateDict, block: str, family: str) -> dict[str, Tensor]:
    """Return a bottleneck convolution for a fine-tuned block that keeps an attention's weights."""
    prefix = f'{block}.attn.'
    attn = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    size = 3 if 'bn_3x3.weight' in attn else 1
    logits = attn['head_probs'][:, SLOTS[family]]
    weights = dict(value=attn['v.weight'], value_bias=attn.get('v.bias'))
    weights |= dict(output=attn['proj.weight'], output_bias=attn['proj.bias'])
    out = fold_heads(weights, logits, ALPHAS[family], size)
    norm = f'bn_{size}x{size}.'
    out |= {f'norm.{k.removeprefix(norm)}': v for k, v in attn.items() if k.startswith(norm)}
    return {f'{block}.attn.{name}': value for name, value in out.items()}
