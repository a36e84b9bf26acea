"""What hooks check of a run: its length, and the checkpoint that it starts from."""

import logging

from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ..models.decider import keep_ratios
from ..utils.checkpoints import check_backbone
from .parameters import bare_model


def check_end(name: str, argument: str, value: int, runner: Runner) -> None:
    """Raise a ValueError if an argument of a hook is more iterations than the training has."""
    if value > runner.max_iters:
        raise ValueError(
            f"{argument} of {name} must be at most the training's {runner.max_iters} iterations, "
            f'got {value}'
        )


def check_architecture(runner: Runner, checkpoint: dict) -> None:
    """Raise a ValueError if a checkpoint is of another backbone than the model's."""
    model = bare_model(runner)
    # Parts of a sharded model have other shapes.
    if hasattr(model, 'backbone') and not isinstance(runner.model, FullyShardedDataParallel):
        check_backbone(model, checkpoint.get('state_dict', checkpoint))


def write_keep_ratios(model: nn.Module, checkpoint: dict) -> None:
    """Write the keep ratios that a training aims at into the metadata of its checkpoint."""
    checkpoint['meta']['keep_ratios'] = keep_ratios(model)


def compare_keep_ratios(runner: Runner, checkpoint: dict) -> None:
    """Warn if a training is resumed with other keep ratios than it had."""
    ratios = keep_ratios(bare_model(runner))
    before = checkpoint.get('meta', {}).get('keep_ratios', ratios)
    if runner._resume and before != ratios:
        print_log(
            f'The resumed training had the keep ratios {before}, this one has {ratios}: the '
            'predictors must learn them in the iterations that are left.',
            logger='current',
            level=logging.WARNING,
        )
