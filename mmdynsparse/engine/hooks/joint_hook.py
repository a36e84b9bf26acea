"""Joint training: one set of weights for the dense model and every keep ratio.

Source: Li et al., *SaiT* (arXiv 2210.05832), which alternates dense and sparse training with shared
weights. Its schedule is by epochs, for one place of pruning and one model family; alternating by
updates, sampled keep ratios and several places are our own.
"""

import math
from collections.abc import Sequence
from numbers import Real

import numpy as np
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import EpochBasedTrainLoop, Runner

from ...models.decider import Decider, deciders
from ...registry import HOOKS
from ..runs import bare_model


@HOOKS.register_module()
class DenseSparseSchedule(Hook):
    """Train a model's sparse parts for every keep ratio, with dense and sparse updates in turn.

    In a dense update everything is kept, which costs what the dense model costs and teaches the
    predictors nothing. In a sparse one the parts have the model's keep ratios, or sampled ones, and
    keep exactly these shares, so that the predictors learn an order of the locations and
    not a rate: a ratio loss has no say. Between updates the model has its own keep ratios, so
    validations and checkpoints are of these. Which updates are sparse, and their ratios, follow
    from the seed of the run and the number of the update alone: they are the same in all
    processes and in a training that is resumed.

    The log gets ``sparse_update``, 1 or 0, and ``keep_ratio``, the mean over all decisions.

    Args:
        period: Number of updates of one kind in a row, >= 1, or 'epoch'. Defaults to 1.
        keep_ratio: Lowest and highest keep ratio of sparse updates, in (0, 1]. Defaults to None,
            the model's own.
        together: Whether one sampled ratio is for all parts, which continue it by their schedules;
            else each decision has its own. Defaults to True.
        parts: Names of the parts of the model that take turns; others keep their ratios and train
            as without this hook. Defaults to None, all.

    Raises:
        ValueError: If an argument is outside its range, or, before the first iteration, the model
            has no such sparse part, or a part cannot have the lowest ratio or selects by a
            threshold.
    """

    def __init__(
        self,
        period: int | str = 1,
        keep_ratio: Sequence[float] | None = None,
        together: bool = True,
        parts: Sequence[str] | None = None,
    ) -> None:
        whole = isinstance(period, int) and not isinstance(period, bool)
        if period != 'epoch' and not (whole and period >= 1):
            raise ValueError(f"period must be at least 1 or 'epoch', got {period!r}")
        if keep_ratio is not None:
            pair = isinstance(keep_ratio, list | tuple) and len(keep_ratio) == 2
            numbers = pair and all(isinstance(r, Real) for r in keep_ratio)
            if not numbers or not 0 < keep_ratio[0] <= keep_ratio[1] <= 1:
                raise ValueError(
                    'keep_ratio must be None or the lowest and the highest keep ratio, in (0, 1], '
                    f'got {keep_ratio!r}'
                )
        self.period = period
        self.keep_ratio = keep_ratio
        self.together = together
        self.parts = parts

    def before_train(self, runner: Runner) -> None:
        """Find the parts and let their predictors learn an order."""
        found = deciders(bare_model(runner))
        names = found if self.parts is None else self.parts
        if not found or not set(names) <= set(found):
            raise ValueError(
                f'parts of DenseSparseSchedule must be sparse parts of the model, {list(found)}, '
                f'got {self.parts}'
            )
        for name in names:
            if found[name].sparsity.selector == 'threshold':
                raise ValueError(
                    'sparsity.selector must keep a share under DenseSparseSchedule, which teaches '
                    f"an order, got 'threshold' in {name}"
                )
        self._own = {found[name]: found[name].keep_ratios for name in names}
        if self.keep_ratio is not None and self.together:
            for name in names:
                self._check_lowest(name, found[name])
        self._updates = self._length(runner)
        for decider in self._own:
            decider.serves_all = True
        turns = f'{self._updates} dense and {self._updates} sparse updates in turn'
        ratios = self.keep_ratio or 'of the model'
        print_log(f'{", ".join(names)}: {turns}, keep ratios {ratios}', logger='current')

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Set the keep ratios of this iteration's update."""
        update = runner.iter // runner.optim_wrapper._accumulative_counts
        is_sparse = update // self._updates % 2 == 1
        if not is_sparse:
            for decider in self._own:
                decider.set_keep_ratio(1.0)
        elif self.keep_ratio is not None:
            self._sample(np.random.default_rng([runner.seed, update]))
        ratios = [ratio for decider in self._own for ratio in decider.keep_ratios]
        runner.message_hub.update_scalar('train/sparse_update', int(is_sparse))
        runner.message_hub.update_scalar('train/keep_ratio', sum(ratios) / len(ratios))

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None
    ) -> None:
        """Give the model its own keep ratios."""
        for decider, ratios in self._own.items():
            decider.keep_ratios = ratios

    def after_train(self, runner: Runner) -> None:
        """Leave the model as it was."""
        for decider in self._own:
            decider.serves_all = False

    def _check_lowest(self, name: str, decider: Decider) -> None:
        try:
            decider.check(self.keep_ratio[0])
        except ValueError as error:
            raise ValueError(
                f'keep_ratio of DenseSparseSchedule goes too low for {name}: {error}'
            ) from None

    def _length(self, runner: Runner) -> int:
        """Return the number of updates of one kind in a row."""
        if self.period != 'epoch':
            return self.period
        loader = runner.train_dataloader
        iters = len(loader)
        if not isinstance(runner.train_loop, EpochBasedTrainLoop):
            # Samplers of such loops never end, and their length is that of the whole dataset.
            iters = math.ceil(len(loader.dataset) / (loader.batch_size * runner.world_size))
        return math.ceil(iters / runner.optim_wrapper._accumulative_counts)

    def _sample(self, rng: np.random.Generator) -> None:
        # Rounded, so that compiled models meet few ratios, each of which compiles anew.
        shared = round(rng.uniform(*self.keep_ratio), 2)
        for decider in self._own:
            if self.together:
                decider.set_keep_ratio(shared)
            else:
                ratios = rng.uniform(*self.keep_ratio, len(decider.keep_ratios)).round(2).tolist()
                decider.set_keep_ratio(decider.nearest(ratios))
