"""What the layouts of all families share."""

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ....ops import bottleneck, mix_heads

StateDict = Mapping[str, Tensor]
Renames = Sequence[tuple[str, str]]


def rename(name: str, renames: Renames) -> str:
    """Apply regular expressions and their replacements to a name, in order."""
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def rename_all(tensors: StateDict, dropped: re.Pattern, renames: Renames = ()) -> StateDict:
    """Rename all tensors, and drop those whose new names match ``dropped``."""
    renamed = ((rename(k, renames), v) for k, v in tensors.items())
    return OrderedDict((k, v) for k, v in renamed if not dropped.search(k))


def predictor_renames(theirs: str, ours: str) -> Renames:
    """Names of the published predictors, whose list is called ``theirs``, in ours."""
    layers = {
        r'in_conv\.0': 'norm',
        r'in_conv\.1': 'fc_in',
        r'out_conv\.0': 'fc1',
        r'out_conv\.2': 'fc2',
        r'out_conv\.4': 'fc3',
    }
    return [(rf'{theirs}\.(\d+)\.{k}\.', rf'{ours}.\1.{v}.') for k, v in layers.items()]


def add_output_norms(out: dict[str, Tensor], first_norm: str) -> None:
    """Make the final norm that of the last stage; those of the others start as identity.

    Args:
        out: State dict, changed in place.
        first_norm: Pattern of the name of one parameter (C,) in each stage.
    """
    dims = [v for k, v in out.items() if re.fullmatch(first_norm, k)]
    for name in [k for k in out if k.startswith('norm.')]:
        out[name.replace('norm.', f'norm{len(dims) - 1}.')] = out.pop(name)
    for i, weight in enumerate(dims[:-1]):
        out[f'norm{i}.weight'] = torch.ones_like(weight)
        out[f'norm{i}.bias'] = torch.zeros_like(weight)


def fold_heads(
    attn: Mapping[str, Tensor | None], head_logits: Tensor, alpha: float, kernel_size: int
) -> dict[str, Tensor]:
    """Return ``reduce`` and ``expand`` of a ``BottleneckConv`` from the weights of an attention.

    Args:
        attn: Tensors by the names 'value', 'value_bias', 'output' and 'output_bias'; biases may be
            None.
        head_logits: (h, 9), positions row by row.
        alpha: Divides them.
        kernel_size: 1 or 3.
    """
    args = (attn['value'], attn['value_bias'], attn['output'], head_logits, alpha)
    mixed = bottleneck(mix_heads(*args), kernel_size)
    out = {
        'reduce.weight': mixed.reduce.contiguous(),
        'reduce.bias': mixed.bias,
        'expand.weight': mixed.expand[:, :, None, None].contiguous(),
        'expand.bias': attn['output_bias'],
    }
    return {name: value for name, value in out.items() if value is not None}
