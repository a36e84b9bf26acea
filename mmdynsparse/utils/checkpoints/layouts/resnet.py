"""Names of ResNet in other code bases.

torchvision's and mmpretrain's are ours but for the classifier; timm puts the deep stem of V1c and
V1d under other names.
"""

import re
from collections import OrderedDict

from .common import StateDict, rename

DROPPED = re.compile(r'^(fc|head)\.')
DEEP_STEM = ((r'^conv1\.(\d)\.', r'stem.\1.'), (r'^bn1\.', 'stem.7.'))


def from_openmmlab(tensors: StateDict) -> StateDict:
    """Drop the classifier."""
    return OrderedDict((k, v) for k, v in tensors.items() if not DROPPED.match(k))


def from_timm(tensors: StateDict) -> StateDict:
    """Convert timm's names."""
    renames = DEEP_STEM if 'conv1.0.weight' in tensors else ()
    return from_openmmlab(OrderedDict((rename(k, renames), v) for k, v in tensors.items()))
