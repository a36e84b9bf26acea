"""What changes in the course of a fine-tuning: keep ratios, temperature, frozen parameters.

Each hook computes its value from the iteration alone, so a resumed training continues where it
was. Iterations are forward passes: with gradient accumulation there are several to an update.
"""

from collections.abc import Sequence

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner

from ...registry import HOOKS
from ...utils.checkpoints import NEW_PARTS, is_new
from ..parameters import bare_model


class _Ramp(Hook):
    """Something that changes linearly from one iteration to another."""

    def __init__(self, begin: int, end: int) -> None:
        if not 0 <= begin < end:
            raise ValueError(f'begin and end must be 0 <= begin < end, got {begin} and {end}')
        self.begin = begin
        self.end = end
        self._parts = []

    def before_train(self, runner: Runner) -> None:
        """Find the sparse parts of the model."""
        name = type(self).__name__
        check_end(name, 'end', self.end, runner)
        model = bare_model(runner)
        self._parts = [m for m in model.modules() if getattr(m, 'keep_ratios', None)]
        if not self._parts:
            raise ValueError(f'{name} needs a model with a sparse part, got {type(model).__name__}')

    def _progress(self, runner: Runner) -> float:
        return min(1.0, max(0.0, (runner.iter - self.begin) / (self.end - self.begin)))


@HOOKS.register_module()
class KeepRatioSchedule(_Ramp):
    """Lower the share that training keeps linearly from everything to the model's keep ratios.

    A falling share of the locations is kept at random, whatever the predictors say, while the
    ratio loss pulls these to the model's own ratios: predictors that first learned to keep
    everything would have to unlearn it. Validation is at the model's own ratios.

    Args:
        begin: Iteration up to which everything is kept and the predictors learn nothing, >= 0.
        end: Iteration from which only the predictors say what is kept.

    Raises:
        ValueError: If not 0 <= ``begin`` < ``end``, or, before the first iteration, the training
            ends before ``end`` or the model has no sparse part.
    """

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Set the share of this iteration."""
        for part in self._parts:
            part.extra_kept = 1 - self._progress(runner)

    def after_train(self, runner: Runner) -> None:
        """Leave it to the predictors."""
        for part in self._parts:
            part.extra_kept = 0.0


@HOOKS.register_module()
class TemperatureSchedule(_Ramp):
    """Change the temperature of the Gumbel-softmax linearly.

    A high one lets all locations learn alike, a low one gives the predictors a gradient that is
    nearer to that of the hard decisions, with more variance.

    Args:
        start: Temperature at ``begin`` and before, > 0.
        stop: Temperature from ``end`` on, > 0.
        end: Iteration at which ``stop`` is reached.
        begin: Iteration up to which ``start`` holds. Defaults to 0.

    Raises:
        ValueError: If an argument is outside its range, or, before the first iteration, the
            training ends before ``end`` or the model has no sparse part.
    """

    def __init__(self, start: float, stop: float, end: int, begin: int = 0) -> None:
        super().__init__(begin, end)
        for name, value in (('start', start), ('stop', stop)):
            if not value > 0:
                raise ValueError(f'{name} must be above 0, got {value!r}')
        self.start = start
        self.stop = stop

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Set the temperature of this iteration."""
        temperature = self.start + self._progress(runner) * (self.stop - self.start)
        for part in self._parts:
            part.temperature = temperature


@HOOKS.register_module()
class FreezePretrained(Hook):
    """Keep pretrained parameters as they are in the first iterations.

    Their gradients are dropped right before the optimizer's step, which then leaves them out:
    no update, weight decay or momentum. Nothing else knows of it, so it goes together with
    distributed training, sharding, mixed precision and resuming. The norm of ``clip_grad`` still
    counts these gradients, and running statistics of batch norms still change.

    Args:
        iters: Number of iterations, > 0.
        new_parts: Parts of the names of the parameters that learn from the start. Defaults to
            those of predictors and fast paths; where only the backbone is pretrained, add the
            heads.

    Raises:
        ValueError: If ``iters`` is not above 0, or, before the first iteration, the training is
            shorter or no parameter is new.
    """

    def __init__(self, iters: int, new_parts: Sequence[str] = NEW_PARTS) -> None:
        if not iters > 0:
            raise ValueError(f'iters must be above 0, got {iters!r}')
        self.iters = iters
        self.new_parts = tuple(new_parts)

    def before_train(self, runner: Runner) -> None:
        """Hook on to the optimizer."""
        check_end(type(self).__name__, 'iters', self.iters, runner)
        parameters = list(bare_model(runner).named_parameters())
        frozen = [p for name, p in parameters if not is_new(name, self.new_parts)]
        if len(frozen) == len(parameters):
            raise ValueError(
                f"new_parts must occur in the names of the model's parameters, got {self.new_parts}"
            )

        def drop_gradients(optimizer, args: tuple, kwargs: dict) -> None:
            if runner.iter < self.iters:
                for p in frozen:
                    p.grad = None

        optimizer = runner.optim_wrapper.optimizer
        self._handle = optimizer.register_step_pre_hook(drop_gradients)
        if runner.iter < self.iters:
            print_log(
                f'{len(frozen)} pretrained parameters are frozen up to iteration {self.iters}',
                logger='current',
            )

    def after_train(self, runner: Runner) -> None:
        """Leave the optimizer as it was."""
        self._handle.remove()


def check_end(name: str, argument: str, value: int, runner: Runner) -> None:
    """Check that what a hook does in the first iterations ends within the training.

    Args:
        name: Name of the hook.
        argument: Name of its argument.
        value: Iterations.
        runner: The runner of the training.

    Raises:
        ValueError: If the training is shorter.
    """
    if value > runner.max_iters:
        raise ValueError(
            f"{argument} of {name} must be at most the training's {runner.max_iters} iterations, "
            f'got {value}'
        )
