"""What every sparse backbone shares: keep ratios, execution and the decisions it made."""

import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import ClassVar

from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn

from ...ops import (
    Decision,
    cell_grid,
    cell_means,
    keep_all,
    region,
    resize_scores,
    sample_decision,
    select_decision,
    spread_decision,
)
from ...registry import MODELS
from ...utils.input_checks import is_new
from ..features import is_exporting, with_decisions
from ..sparsity import Sparsity

EXECUTIONS = ('gather', 'triton', 'masked')


class SparseBackbone(BaseModule):
    """Base of the backbones that send only a part of the locations through the slow path.

    Attributes:
        keep_ratios: Target keep ratio of each decision; change them by ``set_keep_ratio``.
        decisions: Decisions of the last forward, in the order in which they were made.
        execution: How a model in eval mode is executed: 'gather' (the default) computes each path
            on its own locations, 'triton' does so in fused kernels for CUDA (see ``ops.kernels``;
            not for vision transformers, which have no paths to fuse), 'masked' computes both
            everywhere and combines them by the mask. In training it is always masked, which lets
            the predictors learn from the task.
        temperature: Of the Gumbel-softmax by which training samples, > 0; 1 unless changed.
        extra_kept: Share of the locations that training keeps whatever the predictors say, in
            [0, 1]; 0 unless changed, as ``KeepRatioSchedule`` does.
        has_ratio_loss: Whether something trains the predictors towards the keep ratios; set by
            ``SparsityHook``. A sparse backbone that trains without it warns once.

    Args:
        sparsity: Arguments of :class:`~mmdynsparse.models.sparsity.Sparsity`, or None for the
            dense model.
        depths: Blocks of each stage.
        init_cfg: As in every OpenMMLab module. Defaults to None.
    """

    # Type that a config names for the dense original of a family.
    original: ClassVar[str]
    # What ``execution`` may be.
    executions: ClassVar[tuple[str, ...]] = EXECUTIONS
    # Parts of ``sparsity`` that differ from the general defaults in this family.
    default_parts: ClassVar[Mapping] = {}
    # Values of ``sparsity`` that not every family takes, and that this one does.
    options: ClassVar[tuple[str, ...]] = ('cell_size', 'follow')

    def __init__(
        self, sparsity: Mapping | None, depths: Sequence[int], init_cfg: dict | None = None
    ) -> None:
        super().__init__(init_cfg)
        self.sparsity = None
        if sparsity is not None:
            self.sparsity = Sparsity.from_cfg({**self.default_parts, **sparsity}, depths)
            self._check_options()
        self.keep_ratios: list[float] = []
        if self.sparsity is not None:
            self.set_keep_ratio(self.sparsity.keep_ratio)
        self.decisions: list[Decision] = []
        self.execution = 'gather'
        self.temperature = 1.0
        self.extra_kept = 0.0
        self.has_ratio_loss = False
        self._warned = False
        self.register_forward_hook(_forget_exported)

    @property
    def execution(self) -> str:
        """How sparse blocks are executed in eval mode, one of ``executions``."""
        return self._execution

    @execution.setter
    def execution(self, value: str) -> None:
        if value not in self.executions:
            raise ValueError(f'execution must be one of {self.executions}, got {value!r}')
        self._execution = value

    def set_keep_ratio(self, keep_ratio: float | Sequence[float]) -> None:
        """Change the keep ratios of the built model.

        Args:
            keep_ratio: A number in (0, 1], continued by the schedule, or one for each decision.

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
        """Return the blocks of a stage before which a decision is made."""
        return () if self.sparsity is None else self.sparsity.locations.get(stage, ())

    def num_predictors(self, stage: int) -> int:
        """Return how many predictors a stage has: none if it follows."""
        follows = self.sparsity is not None and stage in self.sparsity.follow
        return 0 if follows else len(self.stage_locations(stage))

    def build_predictors(self, stage: int, embed_dims: int) -> list[nn.Module]:
        """Build the predictors of a stage of ``embed_dims`` channels."""
        count = self.num_predictors(stage)
        return [build_part(self.sparsity.predictor, embed_dims) for _ in range(count)]

    def stage_predictors(self, stage: int) -> list[nn.Module]:
        """Return the predictors of a stage, in a backbone that has all of them in one list."""
        first = sum(self.num_predictors(i) for i in range(stage))
        return list(self.predictors)[first : first + self.num_predictors(stage)]

    def cell_size(self, stage: int) -> int:
        """Return the side of the cells for which is decided in a stage, in locations."""
        return 1 if self.sparsity.cell_size is None else self.sparsity.cell_size[stage]

    def decide(
        self, x_BCHW: Tensor, stage: int, predictor: nn.Module | None, last: Decision | None
    ) -> Decision:
        """Make the next decision of this forward, over the locations of a map.

        Args:
            x_BCHW: The map; channels last in memory costs the least.
            stage: Its stage.
            predictor: What scores the cells of the map, or None to follow ``last``.
            last: What this returned before in this forward, or None if nothing.
        """
        decision = self.decide_cells(x_BCHW, stage, predictor, last)
        return spread_decision(decision, tuple(x_BCHW.shape[2:]), self.cell_size(stage))

    def decide_cells(
        self, x_BCHW: Tensor, stage: int, predictor: nn.Module | None, last: Decision | None
    ) -> Decision:
        """Make the next decision, over the cells of a map, and keep it in ``decisions``.

        A predictor in training mode samples, one in eval mode (a frozen stage too) selects. Without
        one it is the mode of the stage that counts. What the predictors learn does not change the
        features they look at: gradients end there. Arguments are those of ``decide``.
        """
        hw, size = tuple(x_BCHW.shape[2:]), self.cell_size(stage)
        grid = cell_grid(hw, size)
        ratio, selector = self.keep_ratios[len(self.decisions)], self.sparsity.selector
        training = (self.stages[stage] if predictor is None else predictor).training
        if ratio >= 1 and not training:
            decision = keep_all(x_BCHW.new_empty(len(x_BCHW), grid[0] * grid[1], 0), grid)
        else:
            with region('predictor'):
                if predictor is None:
                    log_probs = resize_scores(last.scores, last.hw, hw, size)
                else:
                    log_probs = predictor(cell_means(x_BCHW.detach(), size))
            if training:
                decision = sample_decision(
                    log_probs, grid, ratio, self.temperature, selector, extra=self.extra_kept
                )
            else:
                gather = self.execution != 'masked'
                decision = select_decision(log_probs, grid, ratio, selector, gather)
        # torch.compile does not keep what _replace returns.
        self.decisions.append(Decision(*decision[:6], size))
        return decision

    def execution_in(self, training: bool) -> str:
        """Return how blocks in training or eval mode are executed."""
        return 'masked' if training else self.execution

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

    def _check_options(self) -> None:
        for name in ('cell_size', 'follow', 'attention'):
            value = getattr(self.sparsity, name)
            if value and name not in self.options:
                default = Sparsity.__dataclass_fields__[name].default
                raise ValueError(
                    f'sparsity.{name} must be {default} in a {type(self).__name__}, got {value}'
                )

    def with_decisions(self, maps: Sequence) -> tuple:
        """Return the maps of a forward as a tuple that carries its decisions."""
        return with_decisions(maps, self.decisions)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """Leave out the norms of outputs that this model does not have."""
        for name in [k for k in state_dict if re.match(r'norm\d\.', k.removeprefix(prefix))]:
            if name.startswith(prefix) and not hasattr(self, name[len(prefix) :].split('.')[0]):
                del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict:
        """Copies and pickles leave the last forward's decisions, and their graph, behind."""
        return {**super().__getstate__(), 'decisions': []}


def _forget_exported(backbone: SparseBackbone, args: tuple, outs: tuple) -> None:
    """Leave none of the decisions that torch.export traced, which have no values."""
    if is_exporting():
        backbone.decisions = []


def build_part(cfg: dict, embed_dims: int) -> nn.Module:
    """Build a predictor or fast path for ``embed_dims`` channels."""
    return MODELS.build({**cfg, 'embed_dims': embed_dims})


def freeze(module: nn.Module) -> None:
    """Put a module in eval mode and stop its gradients."""
    module.eval()
    module.requires_grad_(False)


def may_be_new(name: str) -> bool:
    """Whether a parameter may be missing in a dense checkpoint: sparse parts, output norms."""
    return is_new(name) or re.match(r'norm\d\.', name) is not None


def check_stages(
    out_indices: Sequence[int],
    frozen_stages: int,
    depths: Sequence[int],
    sparsity: Sparsity | None,
) -> None:
    """Check what refers to stages.

    Raises:
        ValueError: If an output, the number of frozen stages or a predictor is outside the stages
            that there are, or that an output depends on.
    """
    if not out_indices or not all(0 <= i < len(depths) for i in out_indices):
        raise ValueError(f'out_indices must be in 0 to {len(depths) - 1}, got {out_indices}')
    if not -1 <= frozen_stages <= len(depths):
        raise ValueError(f'frozen_stages must be in -1 to {len(depths)}, got {frozen_stages}')
    last = max(out_indices)
    if sparsity is not None and max(sparsity.locations) > last:
        raise ValueError(
            f'sparsity.locations takes stages up to the last output, {last}, '
            f'got stage {max(sparsity.locations)}'
        )


def checkpoint_cfg(init_cfg: dict | None, pretrained: str | None = None) -> dict | None:
    """Return the ``init_cfg`` of a backbone that may still be given ``pretrained``.

    Raises:
        ValueError: If both are given, or one of them names no checkpoint.
    """
    if pretrained is not None:
        if init_cfg is not None or not isinstance(pretrained, str):
            raise ValueError(f'pretrained must be a str without init_cfg, got {pretrained!r}')
        warnings.warn('pretrained is deprecated, use init_cfg instead', stacklevel=3)
        return dict(type='Pretrained', checkpoint=pretrained)
    if init_cfg is not None and 'checkpoint' not in init_cfg:
        raise ValueError(
            f"init_cfg must be dict(type='Pretrained', checkpoint=...), got {init_cfg}"
        )
    return init_cfg
