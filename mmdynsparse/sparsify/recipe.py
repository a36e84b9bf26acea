"""The fine-tuning of a sparse model, as changes of the dense config's training.

What it sets follows ``configs/_base_/schedules/{seg,det}_sparse-*.py`` and ``docs/training.md``:
a tenth of the dense schedule, pretrained parameters at a fifth of the learning rate and frozen in
the first 4% of the iterations, the dense model as the teacher.
"""

import math
from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn

from ..engine.distillation import logit_heads
from ..engine.hooks.distillation_hook import EMPTY_IMAGE
from ..models.decider import deciders

LENGTH = 0.1  # of the dense schedule
FROZEN = 0.04  # of the iterations
PRETRAINED_LR = 0.2  # of the learning rate
# Lengths that schedulers, loops and hooks of OpenMMLab state in epochs or iterations.
LENGTHS = ('begin', 'end', 'T_max', 'step_size', 'switch_epoch', 'num_last_epochs', 'val_begin')
# Ratios that joint training samples. Three predictors in steps of 0.2 need more than 0.4.
JOINT = (0.45, 0.9)


def fine_tuning(
    cfg: Mapping, model: nn.Module, joint: bool = False, length: int | None = None
) -> dict:
    """Return what a config changes to fine-tune its model, which has become sparse.

    Args:
        cfg: The dense config. It is not changed.
        model: The sparse model.
        joint: Whether it is trained for every keep ratio. Defaults to False.
        length: Iterations or epochs, whichever the config counts. Defaults to None, a tenth of
            the dense schedule.

    Raises:
        ValueError: If the config has no training of a length that it states.
    """
    unit, dense_length = _length(cfg)
    length = length or math.ceil(dense_length * LENGTH)
    share = length / dense_length
    return dict(
        **_schedule(cfg, unit, length, share),
        optim_wrapper=_optim_wrapper(cfg),
        custom_hooks=[*_own_hooks(cfg, share), *_sparse_hooks(model, joint)],
    )


def _sparse_hooks(model: nn.Module, joint: bool) -> list[dict]:
    segmentor = hasattr(model, 'decode_head')
    # RoI heads have nothing to learn, and distillation does not see them.
    parts = {name for name in deciders(model) if not name.startswith('roi_head')}
    # What is sparse after the backbone changes most, so its logits weigh more (docs/study.md).
    logit_weight = 5.0 if parts - {'backbone'} else 0.5
    if not _has_logits(model):
        logit_weight = 0.0
    features = dict(backbone=20.0) if 'backbone' in parts else {}
    if not segmentor:
        features = dict(neck=0.5) if getattr(model, 'neck', None) else dict(backbone=0.5)
    hooks = [dict(type='mmdynsparse.DenseSparseSchedule', keep_ratio=JOINT)] if joint else []
    hooks.append(dict(type='mmdynsparse.SparsityHook', weight=10.0))
    if logit_weight or features:
        weights = dict(logit_weight=logit_weight, features=features)
        hooks.append(dict(type='mmdynsparse.DistillationHook', teacher='self', **weights))
    hooks.append(dict(type='mmdynsparse.FreezePretrained', iters=FROZEN))
    return hooks


def _has_logits(model: nn.Module) -> bool:
    """Return whether the logits of a model can be compared with those of a teacher."""
    try:
        logit_heads(model)
    except ValueError:
        return False
    if not hasattr(model, 'decode_head'):
        return True
    model.eval()
    image = torch.zeros(1, 3, EMPTY_IMAGE, EMPTY_IMAGE)
    try:
        with torch.no_grad():  # some heads return more than a map
            return isinstance(model.decode_head(model.extract_feat(image)), Tensor)
    except RuntimeError:  # BEiT takes images of one size only, and the hook's empty one is smaller
        return False


def _optim_wrapper(cfg: Mapping) -> dict:
    """Put our constructor on top of the config's own."""
    optim_wrapper = cfg.get('optim_wrapper') or {}
    paramwise_cfg = dict(pretrained_lr_mult=PRETRAINED_LR)
    if optim_wrapper.get('constructor'):
        paramwise_cfg['constructor'] = optim_wrapper['constructor']
    return dict(
        constructor='mmdynsparse.FineTuneOptimWrapperConstructor', paramwise_cfg=paramwise_cfg
    )


def _length(cfg: Mapping) -> tuple[str, int]:
    """Return the unit and the length of a config's training."""
    loop = cfg.get('train_cfg') or {}
    unit = 'max_iters' if loop.get('max_iters') else 'max_epochs'
    if not loop.get(unit):
        raise ValueError(
            'config must have train_cfg with max_iters or max_epochs to be fine-tuned (or give '
            f'--no-training), got train_cfg {dict(loop)}'
        )
    return unit, loop[unit]


def _schedule(cfg: Mapping, unit: str, length: int, share: float) -> dict:
    """Shorten the loop, the learning rate schedule and the interval of checkpoints."""
    loop = cfg['train_cfg']
    changed = {unit: length, **_shortened(loop, share)}
    default = 1000 if unit == 'max_iters' else 1  # mmengine's
    interval = min(_scaled(loop.get('val_interval', default), share), length)
    changed['val_interval'] = interval
    if 'dynamic_intervals' in loop:
        pairs = loop['dynamic_intervals']
        changed['dynamic_intervals'] = [(_scaled(begin, share), n) for begin, n in pairs]
    schedulers = cfg.get('param_scheduler') or []
    schedulers = schedulers if isinstance(schedulers, list | tuple) else [schedulers]
    schedulers = [scheduler | _shortened(scheduler, share) for scheduler in schedulers]
    schedulers = [s for s in schedulers if s.get('begin', 0) < s.get('end', math.inf)]
    changes = dict(train_cfg=changed, param_scheduler=schedulers)
    if (cfg.get('default_hooks') or {}).get('checkpoint'):
        changes['default_hooks'] = dict(checkpoint=dict(interval=interval))
    return changes


def _own_hooks(cfg: Mapping, share: float) -> list[dict]:
    """Return the config's own hooks, at the times that they have in the shorter training."""
    return [hook | _shortened(hook, share) for hook in deepcopy(cfg.get('custom_hooks') or [])]


def _shortened(node: Mapping, share: float) -> dict:
    """Return the lengths of a config's node, shortened; the end of a training stays its end."""
    short = {key: _scaled(node[key], share) for key in LENGTHS if isinstance(node.get(key), int)}
    if node.get('begin') == 0:
        short['begin'] = 0
    if 'milestones' in node:
        milestones = sorted({_scaled(step, share) for step in node['milestones']})
        short['milestones'] = [step for step in milestones if step < short.get('end', math.inf)]
    return short


def _scaled(length: int, share: float) -> int:
    return max(round(length * share), 1)
