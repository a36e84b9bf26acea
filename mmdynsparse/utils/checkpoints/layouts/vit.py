"""Names of vision transformers in other code bases.

timm's are those of DeiT, of LV-ViT (zihangJiang/TokenLabeling), whose stem has our names, and of
the published DynamicViT of both (raoyongming/DynamicViT), which adds its predictors.
"""

import re

from .common import StateDict, predictor_renames, rename_all

DROPPED = re.compile(r'^(head|head_dist|aux_head|fc_norm)\.|^dist_token$')
TIMM = (
    (r'^patch_embed\.proj\.', 'patch_embed.projection.'),
    (r'^blocks\.', 'layers.'),
    (r'^norm_pre\.', 'ln_pre.'),
    (r'^norm\.', 'ln1.'),
    (r'\.norm(\d)\.', r'.ln\1.'),
    (r'\.attn\.qkv\.', '.attn.attn.in_proj_'),
    (r'\.attn\.proj\.', '.attn.attn.out_proj.'),
    (r'\.mlp\.fc1\.', '.ffn.layers.0.0.'),
    (r'\.mlp\.fc2\.', '.ffn.layers.1.'),
    *predictor_renames('^score_predictor', 'predictors'),
)


def from_timm(tensors: StateDict) -> StateDict:
    """Convert timm's names, LV-ViT's and those of the published DynamicViT."""
    return rename_all(tensors, DROPPED, TIMM)


def from_openmmlab(tensors: StateDict) -> StateDict:
    """Return the names as they are."""
    return tensors
