"""What every sparse backbone shares: decisions, stages, freezing, checkpoints."""

import re
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import ClassVar

import torch.utils.checkpoint as cp
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn

from ...ops import (
    BREAK_EVEN,
    DENSE,
    EXECUTIONS,
    Decision,
    Plan,
    keep_all,
    location_scores,
    plan,
    resize_scores,
)
from ...utils.checkpoints import is_new, load_pretrained
from ..decider import Decider, build_part
from ..features import with_decisions
from ..pruning import Pruning
from ..sparsity import Sparsity


class Block(BaseModule):
    """A block of a backbone, which computes ``_forward``.

    Args:
        with_cp: Whether activations are recomputed in the backward pass.
    """

    def __init__(self, with_cp: bool) -> None:
        super().__init__()
        self.with_cp = with_cp

    def forward(self, x: Tensor, *args) -> Tensor:
        """Return the block's output; the arguments are those of ``_forward``."""
        if self.with_cp and x.requires_grad:
            return cp.checkpoint(self._forward, x, *args, use_reentrant=False)
        return self._forward(x, *args)


class SparseBackbone(BaseModule):
    """Base of the backbones that send only a part of the locations through the slow path.

    Attributes:
        decider: Makes the decisions; see :class:`~mmdynsparse.models.decider.Decider`.

    Args:
        sparsity: Arguments of :class:`~mmdynsparse.models.sparsity.Sparsity`, or None for the
            dense model.
        depths: Blocks of each stage.
        init_cfg: As in every OpenMMLab module. Defaults to None.
        falling: As of ``Decider``. Defaults to False.
        **defaults: Of ``sparsity`` in this family.
    """

    # Type that a config names for the dense original of a family.
    original: ClassVar[str]
    # Layout of the checkpoints that ``init_cfg`` names, see ``convert_checkpoint``.
    source: ClassVar[str]
    # What ``execution`` may be.
    executions: ClassVar[tuple[str, ...]] = EXECUTIONS
    # Values of ``sparsity`` that not every family takes, and that this one does.
    options: ClassVar[tuple[str, ...]] = ('cell_size', 'follow')
    # What is left of the blocks; None in a family that cannot be pruned.
    pruning: Pruning | None = None

    def __init__(
        self,
        sparsity: Mapping | None,
        depths: Sequence[int],
        init_cfg: dict | None = None,
        falling: bool = False,
        **defaults,
    ) -> None:
        super().__init__(init_cfg)
        self.sparsity = None
        if sparsity is not None:
            self.sparsity = Sparsity.from_cfg(sparsity, depths, **defaults)
            self._check_options()
        self.decider = Decider(self.sparsity, executions=self.executions, falling=falling)

    @property
    def keep_ratios(self) -> list[float]:
        """Target keep ratio of each decision; change them by ``set_keep_ratio``."""
        return self.decider.keep_ratios

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """Decisions of the last forward, in the order in which they were made."""
        return self.decider.decisions

    @property
    def execution(self) -> str:
        """How the model is executed in eval mode, one of ``executions``.

        'gather' (the default) computes each path on its own locations; 'triton' does so in fused
        kernels for CUDA (see ``ops.kernels``; not for vision transformers, which have no paths to
        fuse); 'masked' computes both everywhere and combines them by the mask. Training is always
        masked where predictors learn, which lets them learn from the task, and in convolutions,
        whose batch norms see the whole map; without predictors that learn it is as here, but
        'gather' in place of 'triton'.
        """
        return self.decider.execution

    @execution.setter
    def execution(self, value: str) -> None:
        self.decider.execution = value

    def set_keep_ratio(self, keep_ratio: float | Sequence[float]) -> None:
        """Change the keep ratios of the built model, as ``Decider.set_keep_ratio``."""
        self.decider.set_keep_ratio(keep_ratio)

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

    def fast_path_cfg(self, stage: int, block: int) -> dict | None:
        """Return the config of a block's fast path, None before the first decision of a stage."""
        locations = self.stage_locations(stage)
        return self.sparsity.fast_path if locations and block >= locations[0] else None

    def init_weights(self) -> None:
        """Initialize as the original does, then load the checkpoint of ``init_cfg``, if any."""
        self._init_parameters()
        for name, module in self.named_modules():
            if is_new(f'{name}.') and hasattr(module, 'init_weights'):
                module.init_weights()
        if self.init_cfg is None:
            print_log(f'{type(self).__name__} starts from random weights', logger='current')
        else:
            load_pretrained(self, self.init_cfg['checkpoint'], self.source, may_be_new)

    @abstractmethod
    def _init_parameters(self) -> None:
        """Initialize all parameters, as the original does its own."""

    def _finish(self, maps: Iterable, decisions: list[Decision]) -> tuple:
        """End a forward: return its maps as a tuple that carries its decisions."""
        self.decider(decisions)
        return with_decisions(maps, decisions)

    def _check_options(self) -> None:
        for name in ('cell_size', 'follow', 'attention'):
            value = getattr(self.sparsity, name)
            if value and name not in self.options:
                default = Sparsity.__dataclass_fields__[name].default
                raise ValueError(
                    f'sparsity.{name} must be {default} in a {type(self).__name__}, got {value}'
                )

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args) -> None:
        """Leave out the norms of outputs that this model does not have.

        Raises:
            ValueError: If the checkpoint is of a model with another ``pruning.norm_identity``.
        """
        if self.pruning is not None and not self.pruning.search:
            own = self.pruning.norm_identity
            if local_metadata.get('norm_identity', own) != own:
                raise ValueError(
                    f'pruning.norm_identity must be {not own} for this checkpoint, got {own}'
                )
        for name in [k for k in state_dict if re.match(r'norm\d\.', k.removeprefix(prefix))]:
            if name.startswith(prefix) and not hasattr(self, name[len(prefix) :].split('.')[0]):
                del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.pruning is not None and hasattr(destination, '_metadata'):
            destination._metadata[prefix[:-1]]['norm_identity'] = self.pruning.norm_identity


class StagedBackbone(SparseBackbone):
    """Base of the backbones of several stages, each with maps of its own size.

    A family has ``stages`` and says how it enters a stage, how it runs blocks that share a plan,
    and what it returns of a stage. Maps are (B, C, H, W), channels last in memory.

    Args:
        sparsity: As in the base class.
        depths: Blocks of each stage.
        out_indices: Stages whose output is returned.
        frozen_stages: Stages to freeze: -1 none, 0 the stem, i also the first i stages.
        init_cfg: As in every OpenMMLab module. Defaults to None.
        **defaults: Of ``sparsity`` in this family.

    Raises:
        ValueError: If an output, the number of frozen stages or a predictor is outside the stages
            that there are, or that an output depends on.
    """

    # Whether blocks gather the cells of a decision themselves, rather than its locations.
    gathers_cells: ClassVar[bool] = False
    # Share of kept cells from which on masked execution is as fast, without a fast path.
    break_even: ClassVar[float] = BREAK_EVEN

    def __init__(
        self,
        sparsity: Mapping | None,
        depths: Sequence[int],
        out_indices: Sequence[int],
        frozen_stages: int,
        init_cfg: dict | None = None,
        **defaults,
    ) -> None:
        super().__init__(sparsity, depths, init_cfg, **defaults)
        self.out_indices = output_indices(out_indices, 0, len(depths))
        if not -1 <= frozen_stages <= len(depths):
            raise ValueError(f'frozen_stages must be in -1 to {len(depths)}, got {frozen_stages}')
        last = max(self.out_indices)
        if self.sparsity is not None and max(self.sparsity.locations) > last:
            raise ValueError(
                f'sparsity.locations takes stages up to the last output, {last}, '
                f'got stage {max(self.sparsity.locations)}'
            )
        self.frozen_stages = frozen_stages

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the maps (B, C_i, H_i, W_i) of ``out_indices`` for images (B, C, H, W).

        The tuple carries the decisions made on the way, and ``decisions`` holds them afterwards.
        """
        decisions, outs = [], []
        for i in range(max(self.out_indices) + 1):
            x = self._stem(x) if i == 0 else self._downsample(x, i)
            x = self._run_stage(x, i, decisions)
            if i in self.out_indices:
                outs.append(self._output(x, i))
        return self._finish(outs, decisions)

    def _run_stage(self, x: Tensor, stage: int, decisions: list[Decision]) -> Tensor:
        """Run the blocks of a stage, and add its decisions to those of this forward."""
        blocks, locations = self._blocks(stage), self.stage_locations(stage)
        predictors = list(self._predictors(stage)) or [None] * len(locations)
        first = locations[0] if locations else len(blocks)
        x = self._run_blocks(x, blocks[:first], DENSE)
        bounds = pairwise((*locations, len(blocks)))
        for (start, end), predictor in zip(bounds, predictors, strict=True):
            decision = self._decide(x, stage, start, predictor, decisions)
            decisions.append(decision)
            x = self._run_blocks(x, blocks[start:end], self._plan(decision, stage))
        return x

    def _decide(
        self,
        x: Tensor,
        stage: int,
        block: int,
        predictor: nn.Module | None,
        decisions: Sequence[Decision],
    ) -> Decision:
        """Decide before a block, by a predictor or by following the last decision."""
        hw, index = tuple(x.shape[2:]), self.sparsity.index(stage, block)
        size = self.sparsity.cell_size[stage] if self.sparsity.cell_size else 1
        learns = (self.stages[stage] if predictor is None else predictor).training
        if self.decider.keeps_all(index, learns):
            return keep_all(x.shape[0], hw, x.device, size)
        if predictor is not None:
            cells_BNC = self.decider.cells(x, size, predictor)
            return self.decider.predict(cells_BNC, hw, size, index, predictor)
        last = decisions[index - 1]
        log_probs = resize_scores(location_scores(last), last.hw, hw, size)
        return self.decider.decide(log_probs, hw, size, index, sample=learns)

    def _plan(self, decision: Decision, stage: int) -> Plan:
        training, has_fast_path = self.stages[stage].training, self.sparsity.fast_path is not None
        # A fast path gets its gradient even where nothing is dropped.
        needs_mask = has_fast_path if decision.keeps_all else not self.gathers_in_training
        return plan(
            decision,
            'gather' if training and self.execution == 'triton' else self.execution,
            learns=training and (self.decider.learns or needs_mask),
            has_fast_path=has_fast_path,
            of_cells=self.gathers_cells,
            break_even=self.break_even,
        )

    @property
    def gathers_in_training(self) -> bool:
        """Whether blocks may be gathered in training, where no predictor learns."""
        return not self.gathers_cells

    def _blocks(self, stage: int) -> Sequence[nn.Module]:
        return list(self.stages[stage])

    def _predictors(self, stage: int) -> Sequence[nn.Module]:
        """Return the predictors of a stage, in a backbone that has all of them in one list."""
        first = sum(self.num_predictors(i) for i in range(stage))
        return list(self.predictors)[first : first + self.num_predictors(stage)]

    @abstractmethod
    def _stem(self, x: Tensor) -> Tensor:
        """Return the map that enters the first stage, for images."""

    def _downsample(self, x: Tensor, stage: int) -> Tensor:
        """Return the map that enters a later stage, for the output of the one before."""
        return x

    def _run_blocks(self, x: Tensor, blocks: Sequence[nn.Module], plan: Plan) -> Tensor:
        """Run blocks that share a plan."""
        for block in blocks:
            x = block(x, plan)
        return x

    @abstractmethod
    def _output(self, x: Tensor, stage: int) -> Tensor:
        """Return what the backbone returns of a stage, contiguous in memory.

        Operators such as RoIAlign read any map as if it were contiguous.
        """

    def train(self, mode: bool = True) -> 'StagedBackbone':
        """Set the training mode; frozen stages stay in eval mode, without gradients."""
        super().train(mode)
        self._freeze()
        return self

    def _freeze(self) -> None:
        frozen = range(max(self.frozen_stages, 0))
        stem = self._stem_parts() if self.frozen_stages >= 0 else ()
        for part in (*stem, *(part for i in frozen for part in self._stage_parts(i))):
            if isinstance(part, nn.Module):
                part.eval()
            part.requires_grad_(False)
        # What no output depends on never gets a gradient, which distributed training refuses.
        for part in self._unused_parts():
            part.requires_grad_(False)

    def _stem_parts(self) -> Sequence[nn.Module | nn.Parameter]:
        """Return what is frozen with ``frozen_stages`` 0."""
        return ()

    def _stage_parts(self, stage: int) -> Sequence[nn.Module]:
        """Return what is frozen with a stage."""
        return (self.stages[stage], *self._predictors(stage))

    def _unused_parts(self) -> Sequence[nn.Module]:
        """Return what comes after the last output."""
        stages = range(max(self.out_indices) + 1, len(self.stages))
        return [part for i in stages for part in self._stage_parts(i)]


def may_be_new(name: str) -> bool:
    """Whether a parameter may be missing in a dense checkpoint: sparse parts, output norms."""
    return is_new(name) or re.match(r'norm\d\.', name) is not None


def output_indices(given: int | Sequence[int], lowest: int, count: int) -> tuple[int, ...]:
    """Return ``out_indices`` counted from 0; a ValueError if one is not in the allowed range."""
    indices = (given,) if isinstance(given, int) else tuple(given)
    if not indices or not all(lowest <= i < count for i in indices):
        raise ValueError(f'out_indices must be in {lowest} to {count - 1}, got {given}')
    return tuple(i % count for i in indices)


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
