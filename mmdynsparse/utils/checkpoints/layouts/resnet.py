"""Names of ResNet in other code bases.

torchvision's and mmpretrain's are ours but for the classifier; timm puts the deep stem of V1c and
V1d under other names.
"""

import re

from .common import StateDict, rename_all

DROPPED = re.compile(r'^(fc|head)\.')
DEEP_STEM = ((r'^conv1\.(\d)\.', r'stem.\1.'), (r'^bn1\.', 'stem.7.'))


def from_openmmlab(tensors: StateDict) -> StateDict:
    """Drop the classifier."""
    return rename_all(tensors, DROPPED)


def from_timm(tensors: StateDict) -> StateDict:
    """Convert timm's names."""
    return rename_all(tensors, DROPPED, DEEP_STEM if 'conv1.0.weight' in tensors else ())
