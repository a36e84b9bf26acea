"""From a dense config to a sparse one that inherits from it."""

import os.path as osp
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module

from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from ..analysis.dense import resolve_type
from ..models.decider import deciders
from ..utils.command_line.launch import require_library
from .budget import fit_budget
from .config_text import child_config
from .counterparts import PARTS, Part, changes_of, find_part, swap_parts
from .recipe import fine_tuning

# The published ConvNeXt configs import it, for a backbone that is replaced here.
CONVNEXT_HOST = 'mmpretrain'


@dataclass
class Draft:
    """A sparse config that is not written yet.

    Attributes:
        base: Path of the dense config.
        cfg: What is in it, types as strings.
        scope: 'mmseg' or 'mmdet'.
        parts: What becomes of each part of the model.
        changes: What the new config changes.
    """

    base: str
    cfg: dict
    scope: str
    parts: list[Part]
    changes: dict

    @property
    def model_cfg(self) -> ConfigDict:
        """The ``model`` of the new config."""
        model = ConfigDict(deepcopy(self.cfg['model']))
        model.merge(self.changes['model'])
        return model

    @property
    def is_sparse(self) -> bool:
        """Whether a part of the model is sparse, and not just a faster dense one."""
        return any(part.sparsity for part in self.parts)

    def dense_model_cfg(self) -> ConfigDict:
        """Return the dense ``model``; our dense form stands in for types that are not installed."""
        model = ConfigDict(deepcopy(self.cfg['model']))
        for part in self.parts:
            if part.after and resolve_type(part.before) is None:
                find_part(model, part.key).type = part.after
        return model

    def text(self, out: str) -> str:
        """Return the text of the new config for a file ``out``."""
        return child_config(self.base, out, self.cfg, self.changes)


def draft_config(
    path: str,
    parts: Sequence[str] = tuple(PARTS),
    training: bool = True,
    checkpoint: str | None = None,
    joint: bool = False,
    length: int | None = None,
) -> Draft:
    """Make the sparse form of a config of mmseg or mmdet.

    Args:
        path: The dense config, of either style of mmengine.
        parts: Some of ``PARTS``. Defaults to all.
        training: Whether what has to be trained is wanted, with the recipe for it. Defaults to
            True.
        checkpoint: Dense checkpoint to start from. Defaults to None, which the user adds.
        joint: Whether the recipe trains for every keep ratio. Defaults to False.
        length: Iterations or epochs of the recipe, whichever the config counts. Defaults to None,
            a tenth of the dense schedule.

    Raises:
        ValueError: If the config cannot be read or is of no model, its library is missing, or no
            part of it has a sparse counterpart.
    """
    cfg, scope, dropped = _read(path)
    init_default_scope(scope)
    found = swap_parts(cfg['model'], scope, parts, training)
    model = changes_of(found)
    if checkpoint is not None:
        _leave_out_pretrained(model, cfg['model'])
    changes = {} if cfg.get('default_scope') else dict(default_scope=scope)
    changes['model'] = model
    if dropped and any(part.key == 'backbone' and part.after for part in found):
        changes['custom_imports'] = _other_imports(cfg)
    draft = Draft(path, cfg, scope, found, changes)
    sparse = MODELS.build(_without_weights(draft.model_cfg))
    if training and any(decider.learns for decider in deciders(sparse).values()):
        changes |= fine_tuning(cfg, sparse, joint, length)
    if joint:
        # Low keep ratios need it, and others do not lose: docs/budgets.md, what it costs.
        for name, decider in deciders(sparse).items():
            if decider.learns:
                find_part(model, name)['sparsity']['selector'] = 'sampled'
    if checkpoint is not None:
        changes['load_from'] = _absolute(checkpoint)
    return draft


def set_budget(draft: Draft, model: nn.Module, budget: float, cost: Callable[[], float]) -> None:
    """Change the keep ratios of a draft, and of its model, to those of a budget.

    Arguments and errors are those of :func:`~mmdynsparse.sparsify.budget.fit_budget`.
    """
    for name, ratio in fit_budget(model, budget, cost).items():
        # The stages of a cascade share a config, and so a keep ratio.
        key = re.sub(r'\.\d+$', '', name)
        find_part(draft.changes['model'], key)['sparsity']['keep_ratio'] = ratio


def build_models(draft: Draft) -> tuple[nn.Module, nn.Module]:
    """Build the sparse and the dense model of a draft, without any checkpoint, in eval mode."""
    pair = (draft.model_cfg, draft.dense_model_cfg())
    models = [MODELS.build(_without_weights(cfg)) for cfg in pair]
    for model in models:
        model.eval()  # mmseg's VisionTransformer does not return itself
    return tuple(models)


def _read(path: str) -> tuple[dict, str, bool]:
    """Return a config, its scope, and whether it imports what is not there and not needed."""
    if not osp.isfile(path):
        raise ValueError(f'config must be an existing file, got {path!r}')
    try:
        cfg = Config.fromfile(path, import_custom_modules=False)
    except Exception as error:
        raise ValueError(
            f'config must be a readable config file, got {path!r} ({type(error).__name__}: {error})'
        ) from error
    plain = cfg.to_dict()
    if not isinstance(plain.get('model'), Mapping):
        raise ValueError(f'config must have a model, got none in {path!r}')
    scope = plain.get('default_scope') or _scope_of(plain['model'])
    require_library(scope)
    dropped = False
    for name in _imports(plain):
        try:
            import_module(name)
        except ImportError as error:
            if not name.startswith(CONVNEXT_HOST):
                raise ValueError(f'custom_imports of the config fail: {error}') from None
            dropped = True
    return plain, scope, dropped


def _scope_of(model: Mapping) -> str:
    """Return the library of a model that a lazy config names by its class."""
    return str(model.get('type')).split('.')[0]


def _imports(cfg: Mapping) -> list[str]:
    names = (cfg.get('custom_imports') or {}).get('imports') or []
    return [names] if isinstance(names, str) else list(names)


def _other_imports(cfg: Mapping) -> dict | None:
    names = [name for name in _imports(cfg) if not name.startswith(CONVNEXT_HOST)]
    return dict(imports=names) if names else None


def _leave_out_pretrained(model: dict, base: Mapping) -> None:
    """Let the checkpoint be the only one: it holds the backbone."""
    if base.get('pretrained') is not None:
        model['pretrained'] = None
    if base['backbone'].get('init_cfg') is not None:
        model.setdefault('backbone', {})['init_cfg'] = None


def _without_weights(model_cfg: ConfigDict) -> ConfigDict:
    model_cfg.pop('pretrained', None)
    model_cfg.backbone.pop('init_cfg', None)
    model_cfg.backbone.pop('pretrained', None)
    return model_cfg


def _absolute(checkpoint: str) -> str:
    return checkpoint if '://' in checkpoint else osp.abspath(osp.expanduser(checkpoint))
