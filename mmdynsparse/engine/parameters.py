"""The new parameters of a model, and learning rates for them."""

from collections.abc import Mapping, Sequence

from mmengine.optim import OptimWrapper
from torch import nn

from ..registry import OPTIM_WRAPPER_CONSTRUCTORS
from ..utils.checkpoints import GATE_PARTS, NEW_PARTS, is_new, unwrap


def new_parameters(model: nn.Module, parts: Sequence[str]) -> set[str]:
    """Return the names of the parameters in new parts, or raise a ValueError if there are none."""
    new = {name for name, _ in model.named_parameters() if is_new(name, parts)}
    if not new:
        raise ValueError(
            f"new_parts must occur in the names of the model's parameters, got {tuple(parts)}"
        )
    return new


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class FineTuneOptimWrapperConstructor:
    """Give new parameters the full learning rate and pretrained ones a share of it.

    Another constructor sets weight decays, and learning rates by place or layer; this one then
    multiplies the rates of the pretrained parameters and resets those of the new ones, which
    ``custom_keys`` cannot do beside a rule for norms, because only one key counts for a name. The
    gates of a search get a group of their own, the last one, without weight decay.

    Args:
        optim_wrapper_cfg: Config of the optimizer wrapper, with its optimizer.
        paramwise_cfg: Own keys are ``pretrained_lr_mult``, in [0, 1], 1 by default; ``new_parts``,
            parts of the names of the new parameters, by default those of predictors and fast
            paths; ``constructor``, the type of the other constructor, by default
            'DefaultOptimWrapperConstructor'. The rest is for that one. Defaults to None.

    Raises:
        ValueError: If ``pretrained_lr_mult`` is outside its range, there is no learning rate, or
            no parameter is new.
    """

    def __init__(self, optim_wrapper_cfg: Mapping, paramwise_cfg: Mapping | None = None) -> None:
        paramwise_cfg = dict(paramwise_cfg or {})
        self.pretrained_lr_mult = paramwise_cfg.pop('pretrained_lr_mult', 1.0)
        self.new_parts = tuple(paramwise_cfg.pop('new_parts', NEW_PARTS))
        constructor = paramwise_cfg.pop('constructor', 'DefaultOptimWrapperConstructor')
        if not 0 <= self.pretrained_lr_mult <= 1:
            raise ValueError(
                f'pretrained_lr_mult must be in [0, 1], got {self.pretrained_lr_mult!r}'
            )
        self.base_lr = optim_wrapper_cfg['optimizer'].get('lr')
        if self.base_lr is None:
            raise ValueError(
                'optim_wrapper.optimizer.lr must be given for pretrained_lr_mult, got none'
            )
        cfgs = dict(optim_wrapper_cfg=optim_wrapper_cfg, paramwise_cfg=paramwise_cfg)
        self._constructor = OPTIM_WRAPPER_CONSTRUCTORS.build(dict(type=constructor, **cfgs))

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer wrapper of a model."""
        inner = unwrap(model)
        new = {id(inner.get_parameter(name)) for name in new_parameters(inner, self.new_parts)}
        gates = {id(p) for name, p in inner.named_parameters() if is_new(name, GATE_PARTS)}
        wrapper = self._constructor(model)
        groups = wrapper.optimizer.param_groups
        parts = [part for group in groups for part in self._split(group, new, gates)]
        rest = [part for part in parts if not part.pop('has_gates')]
        own = [dict(part, weight_decay=0.0) for part in parts if id(part['params'][0]) in gates]
        groups[:] = [*rest, *_joined(own)]
        return wrapper

    def _split(self, group: dict, new: set[int], gates: set[int]) -> list[dict]:
        """Split a group of the optimizer into gates, new and pretrained parameters."""
        # Only the optimizer may use the names, and only if all parameters have one.
        names = group.get('param_names')
        halves = []
        kinds = [(id(p) in gates, id(p) not in new | gates) for p in group['params']]
        for is_gate, is_pretrained in ((True, False), (False, False), (False, True)):
            wanted = (is_gate, is_pretrained)
            indices = [i for i, kind in enumerate(kinds) if kind == wanted]
            if not indices:
                continue
            lr = group['lr'] * self.pretrained_lr_mult if is_pretrained else self.base_lr
            half = dict(group, params=[group['params'][i] for i in indices], lr=lr)
            half['has_gates'] = is_gate
            if names is not None:
                half['param_names'] = [names[i] for i in indices]
            halves.append(half)
        return halves


def _joined(groups: list[dict]) -> list[dict]:
    """Return groups with the same settings as one."""
    if not groups:
        return []
    one = dict(groups[0], params=[p for group in groups for p in group['params']])
    if 'param_names' in one:
        one['param_names'] = [name for group in groups for name in group['param_names']]
    return [one]
