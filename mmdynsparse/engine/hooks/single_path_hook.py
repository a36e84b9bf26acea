"""The search for what is left of a backbone's attentions and FFNs (SPViT).

Source: He et al., *Pruning Self-attentions into Convolutional Layers in Single Path* (arXiv
2111.11802): the loss on the cost and a constant learning rate for the gates. Our own are: the loss
relative to the dense cost, the falling target, the different first logits of hidden units, the stop
rule, the last shift of the gates, and measured time as a cost.
"""

import json
from collections.abc import Sequence
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from mmengine.dist import get_dist_info, is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import Tensor, nn

from ...registry import HOOKS
from ...utils.checkpoints import GATE_PARTS, is_new
from ..architecture_cost import (
    architecture,
    as_string,
    cost_of_gates,
    dense_cost,
    gated_blocks,
    latency_table,
    lowest_cost,
    macs_table,
    meet_cost,
    spread_units,
)
from ..runs import bare_model

UNITS = dict(macs='GMACs', ms='ms')
# Files in the work dir.
ARCHITECTURE = 'architecture.json'
LATENCIES = 'latencies.json'
CHECKPOINT = 'searched.pth'


@HOOKS.register_module()
class SinglePathSearchHook(Hook):
    """Train the gates of a backbone with ``pruning=dict(search=True)`` towards a cost.

    The model's loss dict gains ``loss_cost`` = weight * ((F - T) / F_dense)^2, F the cost of the
    architecture whose gates are open with a probability above 0.5. T falls from the dense cost to
    the target, so gates close a few at a time and the task decides which. The log gets
    ``cost_share`` = F / F_dense and ``kept_hidden_I``, the share of the hidden units that stage I
    keeps; every check logs the operations of all blocks as a string: M self-attention, 3 and 1
    convolutions, - nothing. Each validation, and the end, writes ``architecture.json`` to the work
    dir, and the end ``searched.pth``. If the last iteration is further from the target than
    ``stop_within``, all gates are shifted by one number first, which leaves their order.

    The random numbers of torch depend on the seed of the run, the rank and the iteration alone, so
    a resumed search samples the gates that it would have sampled.

    Args:
        target: Share of the dense backbone's cost up to 1; above 1, GMACs or ms.
        weight: Weight of the loss, >= 0. Defaults to 30.
        shape: Height and width of the image that costs are for, in px. Defaults to None, the size
            that the data preprocessor pads to.
        gate_lr: Constant learning rate of the gates, > 0. Defaults to 5e-4, the published one for
            Swin.
        unit: 'macs', or 'ms' for time measured on this device. Defaults to 'macs'.
        stop_within: Largest deviation from the target at which the search stops, as a share of the
            target, in [0, 1). Defaults to 0.02.
        patience: Number of checks in a row that find it so, once T is the target, >= 1. Defaults
            to 3.
        interval: Iterations between checks, >= 1. Defaults to 50.
        ramp: Share of the training in which T falls, linearly, in [0, 1]. Defaults to 0.6; 0 is the
            published search.
        spread: Largest distance of the first logits of hidden units from ``pruning.init``, in the
            order of the units' norms, >= 0. Defaults to 1; 0 is the published search. Gates that
            already differ are left alone.

    Raises:
        ValueError: If an argument is outside its range, or, before the first iteration, the model
            has no gates, the target is outside what the gates can reach, the shape is not known,
            or the optimizer has no group for the gates.
    """

    def __init__(
        self,
        target: float,
        weight: float = 30.0,
        shape: Sequence[int] | None = None,
        gate_lr: float = 5e-4,
        unit: str = 'macs',
        stop_within: float = 0.02,
        patience: int = 3,
        interval: int = 50,
        ramp: float = 0.6,
        spread: float = 1.0,
    ) -> None:
        _check('target', target, 'above 0', lambda x: x > 0)
        _check('weight', weight, 'at least 0', lambda x: x >= 0)
        _check('gate_lr', gate_lr, 'above 0', lambda x: x > 0)
        _check('stop_within', stop_within, 'in [0, 1)', lambda x: 0 <= x < 1)
        _check('ramp', ramp, 'in [0, 1]', lambda x: 0 <= x <= 1)
        _check('spread', spread, 'at least 0', lambda x: x >= 0)
        for name, value in (('patience', patience), ('interval', interval)):
            _check(name, value, 'a whole number from 1 on', lambda x: isinstance(x, int) and x >= 1)
        if unit not in UNITS:
            raise ValueError(f'unit must be one of {tuple(UNITS)}, got {unit!r}')
        if shape is not None:
            _check_shape(shape)
        self.target = target
        self.weight = weight
        self.shape = shape
        self.gate_lr = gate_lr
        self.unit = unit
        self.stop_within = stop_within
        self.patience = patience
        self.interval = interval
        self.ramp = ramp
        self.spread = spread
        self._hits = 0

    def before_train(self, runner: Runner) -> None:
        """Find the gates, their costs and their optimizer groups, and add the losses."""
        model = bare_model(runner)
        self._blocks = gated_blocks(getattr(model, 'backbone', None))
        if not self._blocks:
            raise ValueError(
                'SinglePathSearchHook needs a backbone with pruning=dict(search=True), got '
                f'{type(model).__name__} without gates'
            )
        hw, geometry = self._find_shape(model), model.backbone.geometry
        if self.unit == 'ms':
            path = Path(runner.work_dir) / LATENCIES
            self._table = latency_table(model.backbone, hw, path)
        else:
            self._table = macs_table(geometry, hw)
        self._dense = dense_cost(self._blocks, self._table)
        self._goal = self._goal_now = self._find_target()
        spread_units(self._blocks, self.spread)
        self._groups = _gate_groups(model, runner)
        self._handle = model.register_forward_hook(self._add_losses, with_kwargs=True)
        text = f'Search for {self._goal:.4g} of {self._dense:.4g} {UNITS[self.unit]} at {hw} px'
        print_log(text, logger='current')

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Set what changes: the goal, the gates' learning rate and the random numbers."""
        progress = runner.iter / (self.ramp * runner.max_iters) if self.ramp else 1.0
        fallen = min(progress, 1.0)
        self._goal_now = (1 - fallen) * self._dense + fallen * self._goal
        for group in self._groups:
            group['lr'] = self.gate_lr
        rank, _ = get_dist_info()
        sequence = np.random.SeedSequence([runner.seed, rank, runner.iter])
        torch.manual_seed(int(sequence.generate_state(1)[0]))

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None
    ) -> None:
        """Check the architecture; stop where it has met the target often enough."""
        if not self.every_n_train_iters(runner, self.interval):
            return
        cost = self._cost()
        arrived = self._goal_now == self._goal
        self._hits = self._hits + 1 if arrived and self._is_near(cost) else 0
        mixers, _ = architecture(self._blocks)
        text = f'{as_string(mixers)}  {cost / self._dense:.4f} of the dense cost'
        print_log(f'Architecture: {text}', logger='current')
        runner.message_hub.update_info('architecture', as_string(mixers))
        if self._hits >= self.patience:
            runner.train_loop.stop_training = True

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Write down the architecture that was validated."""
        if hasattr(self, '_table'):
            self._write(runner)

    def after_train(self, runner: Runner) -> None:
        """Bring the architecture to its target, say what that took, and save the model."""
        self._handle.remove()
        found = cost = self._cost()
        if not self._is_near(found):
            cost = meet_cost(self._blocks, self._table, self._goal)
        self._write(runner)
        ends = self._deviation(found)
        if cost != found:
            ends = f'{ends}, and with its gates shifted {self._deviation(cost)}'
        print_log(f'The search ends {ends}', logger='current')
        runner.save_checkpoint(runner.work_dir, CHECKPOINT, save_optimizer=False, by_epoch=False)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Note how many checks in a row have met the target."""
        checkpoint['meta']['search_hits'] = self._hits

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Go on counting in a training that is resumed."""
        if runner._resume:
            self._hits = checkpoint.get('meta', {}).get('search_hits', 0)

    def _add_losses(
        self, model: nn.Module, args: tuple, kwargs: dict, losses: dict
    ) -> dict[str, Tensor] | None:
        if kwargs.get('mode') != 'loss':
            return None
        cost = cost_of_gates(self._blocks, self._table)
        loss = self.weight * ((cost - self._goal_now) / self._dense) ** 2
        new = dict(loss_cost=loss, cost_share=cost.detach() / self._dense)
        for i in sorted({block.stage for block in self._blocks}):
            gates = [b.ffn.gate_logits.detach() for b in self._blocks if b.stage == i]
            new[f'kept_hidden_{i}'] = (torch.cat(gates) > 0).float().mean()
        return losses | new

    def _is_near(self, cost: float) -> bool:
        return abs(cost - self._goal) <= self.stop_within * self._goal

    def _deviation(self, cost: float) -> str:
        deviation = (cost - self._goal) / self._goal
        return f'at {cost:.4g} {UNITS[self.unit]}, {deviation:+.2%} off its target'

    def _cost(self) -> float:
        with torch.no_grad():
            return float(cost_of_gates(self._blocks, self._table))

    def _find_shape(self, model: nn.Module) -> tuple[int, int]:
        shape = self.shape
        if shape is None:
            shape = getattr(model.data_preprocessor, 'size', None)
        if shape is None:
            raise ValueError(
                'shape of SinglePathSearchHook must be the height and width of an image, because '
                'the data preprocessor has no size, got None'
            )
        _check_shape(shape)
        return tuple(shape)

    def _find_target(self) -> float:
        """Return the target in GMACs or ms."""
        goal = self.target * self._dense if self.target <= 1 else self.target
        low = lowest_cost(self._blocks, self._table)
        if not low < goal <= self._dense:
            raise ValueError(
                f'target of SinglePathSearchHook must be above {low:.4g} and at most '
                f'{self._dense:.4g} {UNITS[self.unit]}, a share above {low / self._dense:.4f} up '
                f'to 1, got {self.target}'
            )
        return goal

    def _write(self, runner: Runner) -> None:
        if not is_main_process():
            return
        mixers, hidden = architecture(self._blocks)
        cost = self._cost()
        found = dict(mixers=mixers, hidden=hidden, string=as_string(mixers))
        found |= dict(cost=cost, unit=UNITS[self.unit], share=cost / self._dense)
        found |= dict(target=self._goal, iteration=runner.iter)
        (Path(runner.work_dir) / ARCHITECTURE).write_text(json.dumps(found, indent=2))


def _gate_groups(model: nn.Module, runner: Runner) -> list[dict]:
    """Return the optimizer's groups of gates, which hold nothing else."""
    gates = {id(p) for name, p in model.named_parameters() if is_new(name, GATE_PARTS)}
    groups = []
    for group in runner.optim_wrapper.optimizer.param_groups:
        kinds = {id(p) in gates for p in group['params']}
        if kinds == {True, False} or (kinds == {True} and group.get('weight_decay')):
            raise ValueError(
                'optim_wrapper.constructor must be '
                "'mmdynsparse.FineTuneOptimWrapperConstructor' for a search, which gives the gates "
                'a group without weight decay, got another one'
            )
        groups += [group] if kinds == {True} else []
    return groups


def _check(name: str, value: object, allowed: str, holds) -> None:
    if not isinstance(value, Real) or isinstance(value, bool) or not holds(value):
        raise ValueError(f'{name} must be {allowed}, got {value!r}')


def _check_shape(shape: object) -> None:
    pair = isinstance(shape, list | tuple) and len(shape) == 2
    if not pair or not all(isinstance(side, int) and side > 0 for side in shape):
        raise ValueError(f'shape must be the height and width of an image in px, got {shape!r}')
