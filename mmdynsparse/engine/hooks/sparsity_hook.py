"""Ratio loss and measured keep rates of sparse models."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ...models.decider import Decider, deciders, keep_ratios
from ...ops import Decision
from ...registry import HOOKS
from ...utils.checkpoints import check_backbone
from ..runs import bare_model, check_end, seed_each_process, warn

# Iterations between checks for collapse.
CHECK_INTERVAL = 50


@HOOKS.register_module()
class SparsityHook(Hook):
    """Train a model's sparse parts towards their keep ratios and log what they keep.

    In training the model's loss dict gains ``loss_keep_ratio`` and the measured rates
    ``keep_rate_I``, so they pass through AMP, gradient accumulation, DDP, the message hub and the
    visualizer like every other entry. In validation and test the mean rates over all images are
    logged as ``eval_keep_rate_I``. A predictor that keeps (nearly) nothing or everything against
    its target is warned of, and so is a resumed training of other keep ratios. Of predictors that
    have nothing to learn only the rates are logged.

    Each process samples its own decisions: its random numbers in training depend on the seed, the
    rank and the iteration that training starts or resumes from.

    Args:
        weight: Weight of the ratio loss, >= 0. Defaults to 10, the published one for Swin.
        per_image: Whether every image shall meet the ratio, or only the mean of a batch. The
            latter depends on how a batch is split over processes and accumulation steps, each of
            which counts as a batch. Defaults to True.
        warmup_iters: Iterations in which the weight rises linearly from 0. Defaults to 0.

    Raises:
        ValueError: If an argument is outside its range, or, before the first iteration, the model
            has no part that makes decisions, the training is shorter than ``warmup_iters``, or
            the checkpoint is of another backbone.
    """

    def __init__(self, weight: float = 10.0, per_image: bool = True, warmup_iters: int = 0) -> None:
        for name, value in (('weight', weight), ('warmup_iters', warmup_iters)):
            if not value >= 0:
                raise ValueError(f'{name} must be at least 0, got {value!r}')
        self.weight = weight
        self.per_image = per_image
        self.warmup_iters = warmup_iters

    def before_run(self, runner: Runner) -> None:
        """Find the parts that make decisions and start to measure all their forwards."""
        self._model = bare_model(runner)
        self._deciders = list(deciders(self._model).values())
        if not self._deciders:
            raise ValueError(
                'SparsityHook needs a model with a sparse part, for example type='
                f"'mmdynsparse.SparseSwinTransformer', got {type(self._model).__name__} without one"
            )
        self._meter = KeepRateMeter(self._deciders)

    def before_train(self, runner: Runner) -> None:
        """Add the ratio loss to what the model's forward returns in loss mode."""
        seed_each_process(runner.iter)
        check_end(type(self).__name__, 'warmup_iters', self.warmup_iters, runner)

        def add_losses(module: nn.Module, args: tuple, kwargs: dict, losses: dict) -> dict | None:
            if kwargs.get('mode') != 'loss':
                return None
            pairs = [(d, decider) for decider in self._deciders for d in decider.decisions]
            decisions = [d for d, _ in pairs]
            # A decider that follows keeps exactly its ratio.
            counts = [decider.learns and not decider.follows for _, decider in pairs]
            warmup = min(1.0, (runner.iter + 1) / max(self.warmup_iters, 1))
            weight = self.weight * warmup
            return losses | sparsity_losses(decisions, weight, self.per_image, counts)

        self._handle = self._model.register_forward_hook(add_losses, with_kwargs=True)
        for decider in self._deciders:
            decider.has_ratio_loss = True

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None
    ) -> None:
        """Check the mean rates of the last iterations for collapse."""
        if self.every_n_train_iters(runner, CHECK_INTERVAL):
            rates = self._meter.pop()
            if runner.iter >= self.warmup_iters:
                self._warn_of_collapse(rates, f'in training up to iteration {runner.iter + 1}')

    def after_train(self, runner: Runner) -> None:
        """Leave the model as it was."""
        self._handle.remove()
        for decider in self._deciders:
            decider.has_ratio_loss = False

    def _before_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, mode: str = 'train'
    ) -> None:
        """Forget what was measured before a pass over the images of a validation or test."""
        if mode != 'train' and batch_idx == 0:
            self._meter.reset()

    def _after_epoch(self, runner: Runner, mode: str = 'train') -> None:
        """Log the keep rates of a validation or test."""
        if mode != 'train':
            rates = self._meter.pop()
            for i, rate in enumerate(rates):
                runner.message_hub.update_scalar(f'{mode}/eval_keep_rate_{i}', rate)
            self._warn_of_collapse(rates, f'in {mode}')

    def after_run(self, runner: Runner) -> None:
        """Stop measuring."""
        self._meter.close()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Write down the keep ratios that the training aims at."""
        checkpoint['meta']['keep_ratios'] = keep_ratios(self._model)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Refuse another architecture, and warn of other keep ratios where training is resumed."""
        model = bare_model(runner)
        # Parts of a sharded model have other shapes.
        if hasattr(model, 'backbone') and not isinstance(runner.model, FullyShardedDataParallel):
            check_backbone(model, checkpoint.get('state_dict', checkpoint))
        ratios = keep_ratios(model)
        before = checkpoint.get('meta', {}).get('keep_ratios', ratios)
        learns = any(decider.learns for decider in deciders(model).values())
        if runner._resume and learns and before != ratios:
            warn(
                f'The resumed training had the keep ratios {before}, this one has {ratios}: the '
                'predictors must learn them in the iterations that are left.'
            )

    def _warn_of_collapse(self, rates: Sequence[float], when: str) -> None:
        learns = [d.learns for d in self._deciders for _ in d.keep_ratios]
        targets = keep_ratios(self._model)
        for i, (rate, target, may) in enumerate(zip(rates, targets, learns, strict=True)):
            if may and (what := collapse(rate, target)):
                warn(
                    f'Predictor {i} keeps {what} ({rate:.3f} of the locations {when}, target '
                    f'{target}): raise the weight of SparsityHook or the learning rate of the '
                    'predictors.'
                )


class KeepRateMeter:
    """Mean keep rate of each predictor over the images of all forwards since the last ``pop``.

    Args:
        deciders: Those to watch, their predictors numbered through.
    """

    def __init__(self, deciders: Sequence[Decider]) -> None:
        self._deciders = deciders
        self._handles = [decider.register_forward_hook(self._add) for decider in deciders]
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        # Of each rate over images, and the number of these. Tensors from the start: anything else
        # would make a compiled model compile again.
        self._sums = {d: torch.zeros(len(d.keep_ratios) + 1) for d in self._deciders}

    def _add(self, decider: Decider, args: tuple[Sequence[Decision]], output: None) -> None:
        rates = torch.stack([d.mask.detach().mean() for d in args[0]])
        new = len(args[0][0].mask) * torch.cat((rates, torch.ones_like(rates[:1])))
        self._sums[decider] = self._sums[decider].to(new.device) + new

    def pop(self) -> list[float]:
        """Return the means over all processes, NaN without a forward, and start anew."""
        means = []
        for sums in self._sums.values():
            all_reduce(sums)
            means += (sums[:-1] / sums[-1]).tolist()
        self.reset()
        return means

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()


@contextmanager
def recorded_keep_rates(model: nn.Module) -> Iterator[list[float]]:
    """Record what share of the locations the predictors of a model keep outside of training.

    Yields:
        A list that gets, at the end, the share that each predictor kept, in the order of the
        modules: the mean over the images of all calls, of which a sliding window makes several an
        image. Those of a part that did not run are left out.
    """
    meter, rates = KeepRateMeter(list(deciders(model).values())), []
    try:
        yield rates
    finally:
        meter.close()
    rates += [rate for rate in meter.pop() if rate == rate]  # NaN without a call


def sparsity_losses(
    decisions: Sequence[Decision],
    weight: float,
    per_image: bool = True,
    counts: Sequence[bool] | None = None,
) -> dict[str, Tensor]:
    """Ratio loss and measured keep rates of the decisions of one training forward.

    ``loss_keep_ratio`` is ``weight * mean_i((mean(mask_i) - ratio_i) ** 2)`` over predictors i,
    the inner mean taken for each image (and the squares averaged) or over the batch
    (Rao et al., T-PAMI 2023, section 3.4). Where some decisions carry a gradient, the others, of
    frozen predictors or of none, take no part in the loss.

    Args:
        decisions: Decisions with masks (B, N).
        weight: Weight of the loss.
        per_image: See above. Defaults to True.
        counts: Whether each decision may take part in the loss. Defaults to None, all of them.

    Returns:
        Scalars 'loss_keep_ratio', where a decision may take part in it, and 'keep_rate_I' for each
        predictor; nothing without decisions.
    """
    if not decisions:
        return {}
    dims = 1 if per_image else (0, 1)
    pairs = list(zip(decisions, counts or [True] * len(decisions), strict=True))
    rates = {f'keep_rate_{i}': d.mask.detach().mean() for i, d in enumerate(decisions)}
    if not any(may for _, may in pairs):
        return rates
    learned = [d for d, may in pairs if d.mask.requires_grad and may] or decisions
    errors = [(d.mask.mean(dims) - d.ratio).square().mean() for d in learned]
    return {'loss_keep_ratio': weight * torch.stack(errors).mean(), **rates}


def collapse(rate: float, target: float) -> str:
    """Return 'nothing' or 'everything' for a rate next to it against its target, else ''.

    Next to it is within a tenth of the share that the target would keep, or drop.
    """
    if rate < 0.1 * target:
        return 'nothing'
    if 1 - rate < 0.1 * (1 - target):
        return 'everything'
    return ''
