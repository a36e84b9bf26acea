"""Random numbers of the processes of a training."""

import numpy as np
import torch
from mmengine.dist import get_dist_info


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
