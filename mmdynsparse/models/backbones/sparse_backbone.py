"""What every sparse backbone shares: keep ratios, execution and the decisions it made."""

import logging
from collections.abc import Mapping, Sequence

from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn

from ...ops import Decision, keep_all, sample_decision, select_decision
from ...registry import MODELS
from ..sparsity import Sparsity

EXECUTIONS = ('auto', 'masked', 'gather')


class SparseBackbone(BaseModule):
    """Base of the backbones that send only a part of the locations through the slow path.

    Attributes:
        keep_ratios: Target keep ratio of each predictor; change them by ``set_keep_ratio``.
        decisions: Decisions of the last forward, in the order of the predictors.
        execution: 'masked' computes both paths everywhere and combines them by the mask, 'gather'
            computes each path on its own locations; 'auto' is masked in training, gather in eval.
            In training only masked execution lets the predictors learn from the task.
        has_ratio_loss: Whether something trains the predictors towards the keep ratios; set by
            ``SparsityHook``. A sparse backbone that trains without it warns once.

    Args:
        sparsity: Arguments of :class:`~mmdynsparse.models.sparsity.Sparsity`, or None for the
            dense model.
        depths: Blocks of each stage.
        init_cfg: As in every OpenMMLab module. Defaults to None.
    """

    def __init__(
        self, sparsity: Mapping | None, depths: Sequence[int], init_cfg: dict | None = None
    ) -> None:
        super().__init__(init_cfg)
        self.sparsity = None if sparsity is None else Sparsity.from_cfg(sparsity, depths)
        self.keep_ratios: list[float] = []
        if self.sparsity is not None:
            self.set_keep_ratio(self.sparsity.keep_ratio)
        self.decisions: list[Decision] = []
        self.execution = 'auto'
        self.has_ratio_loss = False
        self._warned = False

    @property
    def execution(self) -> str:
        """How sparse blocks are executed, one of ``EXECUTIONS``."""
        return self._execution

    @execution.setter
    def execution(self, value: str) -> None:
        if value not in EXECUTIONS:
            raise ValueError(f'execution must be one of {EXECUTIONS}, got {value!r}')
        self._execution = value

    def set_keep_ratio(self, keep_ratio: float | Sequence[float]) -> None:
        """Change the keep ratios of the built model.

        Args:
            keep_ratio: A number in (0, 1], continued by the schedule, or one for each predictor.

        Raises:
            ValueError: If a ratio is outside (0, 1], the list has the wrong length or the
                backbone is dense.
        """
        if self.sparsity is None:
            raise ValueError(
                f'keep_ratio needs a sparse backbone, got {keep_ratio} for a dense one'
            )
        self.keep_ratios = self.sparsity.resolve(keep_ratio)

    def stage_locations(self, stage: int) -> tuple[int, ...]:
        """Return the blocks of a stage before which a predictor decides."""
        return () if self.sparsity is None else self.sparsity.locations.get(stage, ())

    def decide(self, x_BNC: Tensor, hw: tuple[int, int], predictor: nn.Module) -> Decision:
        """Make the next decision of this forward and keep it in ``decisions``.

        A predictor in training mode samples, one in eval mode (a frozen stage too) selects.
        """
        ratio = self.keep_ratios[len(self.decisions)]
        if predictor.training:
            decision = sample_decision(predictor(x_BNC), hw, ratio)
        elif ratio >= 1:
            decision = keep_all(x_BNC, hw)
        else:
            gather = self.execution != 'masked'
            decision = select_decision(predictor(x_BNC), hw, ratio, self.sparsity.selector, gather)
        self.decisions.append(decision)
        return decision

    def gathers(self, training: bool) -> bool:
        """Return whether blocks in training or eval mode run gathered."""
        return self.execution == 'gather' or (self.execution == 'auto' and not training)

    def start_decisions(self) -> None:
        """Forget the decisions of the last forward; call it at the start of each."""
        self.decisions = []
        sparse = self.training and any(r < 1 for r in self.keep_ratios)
        if sparse and not self.has_ratio_loss and not self._warned:
            self._warned = True
            print_log(
                f'{type(self).__name__} trains without a ratio loss, so nothing holds its keep '
                "rate: add custom_hooks=[dict(type='mmdynsparse.SparsityHook')] to the config.",
                logger='current',
                level=logging.WARNING,
            )

    def __getstate__(self) -> dict:
        """Copies and pickles leave the last forward's decisions, and their graph, behind."""
        return {**self.__dict__, 'decisions': []}


def build_part(cfg: dict, embed_dims: int) -> nn.Module:
    """Build a predictor or fast path for ``embed_dims`` channels."""
    return MODELS.build({**cfg, 'embed_dims': embed_dims})
