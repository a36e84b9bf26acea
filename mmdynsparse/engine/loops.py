"""Validation and test of one model at several keep ratios."""

from collections.abc import Iterator, Sequence

from mmengine.runner import TestLoop, ValLoop

from ..models.budgets import same_keep_ratios, set_budget
from ..models.decider import deciders
from ..registry import LOOPS
from .runs import bare_model


class MultiBudget:
    """Adds budgets to a loop of mmengine that evaluates.

    The metrics of a budget are named ``budget=NAME/METRIC``, those of a keep ratio
    ``r=RATIO/METRIC``. The model as it is comes last, under the plain names, so ``save_best`` and
    whatever else reads these works as without. Every hook of an iteration runs for each of them;
    those of the epoch run once, with all metrics. The model has its own keep ratios again at the
    end.

    Args:
        *args: As of the loop.
        budgets: Names of budgets, see ``set_budget``. Defaults to ().
        keep_ratios: Numbers in (0, 1], for all parts, which continue them by their schedules.
            Defaults to ().
        **kwargs: As of the loop.

    Raises:
        ValueError: If none of both is given, a part cannot have a keep ratio, or, when it is
            evaluated, the model has no such budget.
    """

    mode: str

    def __init__(
        self,
        *args: object,
        budgets: Sequence[str] = (),
        keep_ratios: Sequence[float] = (),
        **kwargs: object,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._model = bare_model(self.runner)
        if not (budgets or keep_ratios) or not deciders(self._model):
            raise ValueError(
                f'{type(self).__name__} needs budgets or keep_ratios, and a model with a sparse '
                f'part, got {budgets}, {keep_ratios} and a {type(self._model).__name__}'
            )
        for decider in deciders(self._model).values():
            for ratio in keep_ratios:
                decider.check(ratio)
        self.budgets = budgets
        self.keep_ratios = keep_ratios

    def run(self) -> dict[str, float]:
        """Evaluate once for each budget and keep ratio, and once more."""
        self.runner.call_hook(f'before_{self.mode}')
        self.runner.call_hook(f'before_{self.mode}_epoch')
        self.runner.model.eval()
        metrics = {}
        with same_keep_ratios(self._model):
            for prefix in self._budgets():
                metrics |= {f'{prefix}/{name}': x for name, x in self._evaluate().items()}
        metrics |= self._evaluate()
        self.runner.call_hook(f'after_{self.mode}_epoch', metrics=metrics)
        self.runner.call_hook(f'after_{self.mode}')
        return metrics

    def _budgets(self) -> Iterator[str]:
        """Give the model one budget after the other; yields what is put before the metrics."""
        for budget in self.budgets:
            set_budget(self._model, budget)
            yield f'budget={str(budget).rpartition(":")[2]}'
        for ratio in self.keep_ratios:
            for decider in deciders(self._model).values():
                decider.set_keep_ratio(ratio)
            yield f'r={ratio}'

    def _evaluate(self) -> dict[str, float]:
        for idx, data_batch in enumerate(self.dataloader):
            self.run_iter(idx, data_batch)
        return self.evaluator.evaluate(len(self.dataloader.dataset))


@LOOPS.register_module()
class MultiBudgetValLoop(MultiBudget, ValLoop):
    """``ValLoop`` at several budgets or keep ratios; see :class:`MultiBudget`."""

    mode = 'val'


@LOOPS.register_module()
class MultiBudgetTestLoop(MultiBudget, TestLoop):
    """``TestLoop`` at several budgets or keep ratios; see :class:`MultiBudget`."""

    mode = 'test'
