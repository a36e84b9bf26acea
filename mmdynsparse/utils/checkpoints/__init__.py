"""Checkpoints: reading and checking them, and the layouts of other code bases."""

from .convert import convert_checkpoint
from .files import check_checkpoint, read_checkpoint
from .layouts import SOURCES
from .pruned import Pruned, architecture_of, prune_state_dict
from .resize import resize_bias_table, resize_pos_embed
from .weights import (
    GATE_PARTS,
    NEW_PARTS,
    check_backbone,
    check_weights,
    is_new,
    load_pretrained,
    unwrap,
)
from .writing import PARTIAL, WHOLE_FILES, WholeFileBackend, newest_checkpoint

__all__ = [
    'GATE_PARTS',
    'NEW_PARTS',
    'PARTIAL',
    'SOURCES',
    'WHOLE_FILES',
    'Pruned',
    'WholeFileBackend',
    'architecture_of',
    'check_backbone',
    'check_checkpoint',
    'check_weights',
    'convert_checkpoint',
    'is_new',
    'load_pretrained',
    'newest_checkpoint',
    'prune_state_dict',
    'read_checkpoint',
    'resize_bias_table',
    'resize_pos_embed',
    'unwrap',
]
