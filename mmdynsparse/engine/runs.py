"""What hooks share: the model, the length and the random numbers of a run, and warnings."""

import logging

import numpy as np
import torch
from mmengine.dist import get_dist_info
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import nn

from ..utils.checkpoints import unwrap


def bare_model(runner: Runner) -> nn.Module:
    """Return the model of a runner without wrappers."""
    return unwrap(runner.model)


def check_end(name: str, argument: str, value: int, runner: Runner) -> None:
    """Raise a ValueError if an argument of a hook is more iterations than the training has."""
    if value > runner.max_iters:
        raise ValueError(
            f"{argument} of {name} must be at most the training's {runner.max_iters} iterations, "
            f'got {value}'
        )


def warn(message: str) -> None:
    """Write a warning to the log of the run."""
    print_log(message, logger='current', level=logging.WARNING)


def seed_each_process(iteration: int) -> None:
    """Seed a process of its own, so that each samples its own decisions.

    Args:
        iteration: Iteration that training starts or resumes from. The first process of a new
            training keeps the seed that it has.
    """
    rank, _ = get_dist_info()
    if rank or iteration:
        entropy = [torch.initial_seed(), rank, iteration]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
