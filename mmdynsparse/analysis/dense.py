"""The dense original of any sparse model, with the same weights."""

import inspect
from collections.abc import Mapping
from copy import deepcopy
from typing import NamedTuple

from mmengine.registry import MODELS
from torch import nn

SCOPE = 'mmdynsparse.'


class DenseConfig(NamedTuple):
    """Config of a dense original."""

    model: dict
    originals: list[str]  # what replaces each sparse part, in the order of the config


class Pair(NamedTuple):
    """A sparse model and its dense original with the same weights, both in eval mode."""

    sparse: nn.Module
    dense: nn.Module
    originals: list[str]


def dense_config(model_cfg: Mapping) -> DenseConfig:
    """Replace every sparse type of a model's config by the OpenMMLab type that it stands for.

    Types are resolved as in a training of that config, under mmengine's current default scope. The
    original of a pruned part is the one before pruning. Arguments that only the sparse type takes
    are dropped. Where the original's library is not installed, the sparse class without
    ``sparsity``, which computes the same, stands in.

    Args:
        model_cfg: The ``model`` of a config. It is not changed.

    Raises:
        ValueError: If nothing in it is sparse.
    """
    cfg = deepcopy(dict(model_cfg))
    originals = []
    _replace(cfg, originals)
    if not originals:
        raise ValueError(
            "config must have a sparse part, a type such as 'mmdynsparse.SparseSwinTransformer' "
            f'with sparsity, got none among {_types(model_cfg)}'
        )
    return DenseConfig(cfg, originals)


def build_pair(model_cfg: Mapping) -> Pair:
    """Build a model and its dense original with the sparse model's (random) weights.

    Weights that the config's ``init_cfg`` names are not loaded. Call ``share_weights`` again when
    those of the sparse model have changed.

    Raises:
        ValueError: If the config has no sparse part.
    """
    dense_cfg = dense_config(model_cfg)
    sparse, dense = MODELS.build(deepcopy(dict(model_cfg))), MODELS.build(dense_cfg.model)
    for model in (sparse, dense):
        model.eval()  # mmseg's VisionTransformer does not return itself
    share_weights(sparse, dense)
    return Pair(sparse, dense, dense_cfg.originals)


def share_weights(sparse: nn.Module, dense: nn.Module) -> None:
    """Copy the weights of a sparse model that its dense original has, which is all of them.

    Where the backbone is pruned, its original keeps weights of its own in the place of those that
    are gone: its cost does not depend on them.

    Raises:
        ValueError: If the original has weights that the sparse model lacks.
    """
    weights = sparse.state_dict()
    if getattr(getattr(sparse, 'backbone', None), 'pruning', None) is not None:
        own = dense.state_dict()
        known = {k: v for k, v in weights.items() if k in own and v.shape == own[k].shape}
        weights = own | known
    missing = dense.load_state_dict(weights, strict=False).missing_keys
    missing = [key for key in missing if not key.endswith('num_batches_tracked')]
    if missing:
        raise ValueError(
            'a sparse part must have the state-dict names of its original, '
            f'got none for {", ".join(missing[:4])}'
        )


def _replace(node: object, originals: list[str]) -> None:
    children = node.values() if isinstance(node, dict) else node
    for child in children:
        if isinstance(child, dict | list | tuple):
            _replace(child, originals)
    sparse = _sparse_class(node) if isinstance(node, dict) else None
    if sparse is None:
        return
    is_sparse = node.pop('sparsity', None) is not None or 'sparsity' not in _arguments(sparse)
    is_sparse = node.pop('pruning', None) is not None or is_sparse
    original = resolve_type(sparse.original)
    name = f'{sparse.__name__} without sparsity (for {sparse.original})'
    if original is not None:
        name = f'{original.__module__.split(".")[0]}.{original.__name__}'
        for argument in _arguments(sparse) - _arguments(original):
            node.pop(argument, None)
        node['type'] = sparse.original
    if is_sparse:
        originals.append(name)


def _sparse_class(node: dict) -> type | None:
    """Class that a node of a config names if it has a dense original."""
    kind = node.get('type')
    if isinstance(kind, str):
        kind = resolve_type(kind) if kind.startswith(SCOPE) else None
    return kind if hasattr(kind, 'original') else None


def resolve_type(name: str) -> type | None:
    """Return the class that a config names under mmengine's default scope, None if none is."""
    with MODELS.switch_scope_and_registry(None) as registry:
        try:
            return registry.get(name)
        except RuntimeError:  # mmengine's answer to a name that nobody registered
            return None


def _arguments(cls: type) -> set[str]:
    """Names of the arguments of a class, with those that it passes on to its bases."""
    names = set()
    for base in cls.__mro__:
        if '__init__' in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()
            names.update(p.name for p in parameters)
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return names


def _types(cfg: Mapping) -> str:
    """Name the types of a model and of its direct parts."""
    parts = [cfg, *(value for value in cfg.values() if isinstance(value, dict))]
    return ', '.join(str(part['type']) for part in parts if 'type' in part)
