"""Parameters that are frozen at the start of a fine-tuning."""

import math
from collections.abc import Sequence

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner

from ...registry import HOOKS
from ...utils.checkpoints import NEW_PARTS
from ..parameters import new_parameters
from ..runs import bare_model, check_end


@HOOKS.register_module()
class FreezePretrained(Hook):
    """Keep pretrained parameters as they are in the first iterations.

    Their gradients are dropped right before the optimizer's step, which then leaves them out:
    no update, weight decay or momentum. Nothing else knows of it, so it goes together with
    distributed training, sharding, mixed precision and resuming. The norm of ``clip_grad`` still
    counts these gradients, and running statistics of batch norms still change.

    Args:
        iters: Number of iterations, >= 1: forward passes, of which gradient accumulation has
            several to an update. A number below 1, > 0, is a share of the training's iterations.
        new_parts: Parts of the names of the parameters that learn from the start. Defaults to
            those of predictors and fast paths; where only the backbone is pretrained, add the
            heads.

    Raises:
        ValueError: If ``iters`` is not above 0, or, before the first iteration, the training is
            shorter or no parameter is new.
    """

    def __init__(self, iters: float, new_parts: Sequence[str] = NEW_PARTS) -> None:
        if not iters > 0:
            raise ValueError(f'iters must be above 0, got {iters!r}')
        self.iters = iters
        self.new_parts = tuple(new_parts)

    def before_train(self, runner: Runner) -> None:
        """Hook on to the optimizer."""
        iters = self.iters if self.iters >= 1 else math.ceil(self.iters * runner.max_iters)
        check_end(type(self).__name__, 'iters', iters, runner)
        model = bare_model(runner)
        new = new_parameters(model, self.new_parts)
        frozen = [p for name, p in model.named_parameters() if name not in new]

        def drop_gradients(optimizer, args: tuple, kwargs: dict) -> None:
            if runner.iter < iters:
                for p in frozen:
                    p.grad = None

        optimizer = runner.optim_wrapper.optimizer
        self._handle = optimizer.register_step_pre_hook(drop_gradients)
        if runner.iter < iters:
            text = f'{len(frozen)} pretrained parameters are frozen up to iteration {iters}'
            print_log(text, logger='current')

    def after_train(self, runner: Runner) -> None:
        """Leave the optimizer as it was."""
        self._handle.remove()
