"""The one maker of decisions, which backbones, necks and heads own."""

import logging
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor, nn

from ..ops import (
    Decision,
    Plan,
    cell_grid,
    cell_means,
    is_exporting,
    keep_all,
    plan,
    region,
    resize_scores,
    sample_decision,
    select_decision,
)
from ..registry import MODELS
from .features import decisions_of
from .sparsity import BACKBONE, CellSparsity, RegionSparsity, Sparsity


class Decider(nn.Module):
    """Decides which cells take the slow path, for one backbone, neck or head.

    A forward of the part numbers its decisions, keeps them in a list of its own, and ends with
    ``decider(decisions)``. So several threads may run one model in eval mode at once; hooks on the
    decider see the decisions of each forward.

    Attributes:
        keep_ratios: Target keep ratio of each decision; change them by ``set_keep_ratio``.
        decisions: Decisions of the last forward that came to its end, in their order.
        has_ratio_loss: Whether something trains the predictors towards the keep ratios; set by
            ``SparsityHook``. A predictor that trains without it warns once.
        serves_all: Whether training samples exactly the keep ratio, so that predictors learn an
            order of the cells, which serves every keep ratio; set by ``DenseSparseSchedule``.
        budgets: Keep ratios of each budget by its name; see ``set_budget``. They are saved and
            loaded with the weights.
        follows: Whether a neck or head takes the scores of the backbone's predictors.
        learns: Whether what scores the cells has something to learn. If not, training selects as
            inference does.
        reads: What predictors look at: 'maps', or the 'attention' of the layer before.

    Args:
        sparsity: Keep ratios, selector and, of a neck or head, predictor.
        embed_dims: Channels of what the predictor of a neck or head sees. Defaults to None, for a
            backbone, which has predictors of its own.
        executions: What ``execution`` may be, some of ``ops.EXECUTIONS``. Defaults to 'gather' and
            'masked'.
        falling: Whether no keep ratio may be above the one before. Defaults to False.

    Raises:
        ValueError: If the predictor does not go with the part or with the selector.
    """

    def __init__(
        self,
        sparsity: Sparsity | CellSparsity | RegionSparsity | None,
        embed_dims: int | None = None,
        executions: Sequence[str] = ('gather', 'masked'),
        falling: bool = False,
    ) -> None:
        super().__init__()
        self.sparsity = sparsity
        self.executions = tuple(executions)
        self.falling = falling
        self.predictor = None
        self.follows = False
        if embed_dims is not None:
            self.follows = sparsity.predictor == BACKBONE
        predictor = None if sparsity is None or self.follows else sparsity.predictor
        kind = predictor and _part_type(predictor)
        self.learns = self.follows or (kind is not None and getattr(kind, 'learns', True))
        self.reads = getattr(kind, 'reads', 'maps')
        if predictor is not None:
            self._check_predictor(predictor)
            if embed_dims is not None:
                self.predictor = build_part(predictor, embed_dims)
        self.keep_ratios: list[float] = []
        if sparsity is not None:
            self.set_keep_ratio(sparsity.keep_ratio)
        self.decisions: tuple[Decision, ...] = ()
        self.execution = 'gather'
        self.has_ratio_loss = False
        self.serves_all = False
        self.budgets: dict[str, list[float]] = {}
        self._warned = False

    @property
    def execution(self) -> str:
        """How the part is executed in eval mode, one of ``executions``; see ``ops.Plan``."""
        return self._execution

    @execution.setter
    def execution(self, value: str) -> None:
        if value not in self.executions:
            raise ValueError(f'execution must be one of {self.executions}, got {value!r}')
        self._execution = value

    def set_keep_ratio(self, keep_ratio: float | Sequence[float]) -> None:
        """Change the keep ratios of the built model.

        Args:
            keep_ratio: As of :meth:`check`, which raises the errors.
        """
        self.keep_ratios = self.check(keep_ratio)

    def check(self, keep_ratio: float | Sequence[float]) -> list[float]:
        """Return a keep ratio for each decision.

        Args:
            keep_ratio: A number in (0, 1]; a backbone continues it by its schedule, or takes one
                for each decision.

        Raises:
            ValueError: If a ratio is outside (0, 1], the list has the wrong length, ratios rise
                where they must not, or the part is dense.
        """
        if self.sparsity is None:
            raise ValueError(
                f'keep_ratio needs a sparse backbone, got {keep_ratio} for a dense one'
            )
        ratios = self.sparsity.resolve(keep_ratio)
        if self.falling and ratios != sorted(ratios, reverse=True):
            raise ValueError(
                'keep_ratio must not rise from one decision to the next where what is dropped '
                f'stays so, got {ratios}'
            )
        return ratios

    def nearest(self, ratios: Sequence[float]) -> list[float]:
        """Return keep ratios that the part can have for any in (0, 1], one for each decision."""
        ratios = sorted(ratios, reverse=True) if self.falling else list(ratios)
        for i, follows in enumerate(self.sparsity.followers):
            if follows:
                ratios[i] = ratios[i - 1]
        return ratios

    def keeps_all(self, index: int = 0, learns: bool = False) -> bool:
        """Whether nothing has to be looked at: every cell is kept and nothing is learned.

        Args:
            index: Number of the decision. Defaults to 0.
            learns: Whether what scores the cells is in training mode. Defaults to False.
        """
        return self.keep_ratios[index] >= 1 and not (learns and self.learns)

    def cells(self, x_BCHW: Tensor, size: int, predictor: nn.Module | None = None) -> Tensor:
        """Return what a predictor sees of the cells of a map, (B, N, C).

        A predictor with a method ``pool`` says itself what that is; else it is the cells' means.

        Args:
            x_BCHW: The map.
            size: Side of a cell on this map, in positions.
            predictor: Defaults to None, the decider's own.
        """
        return getattr(predictor or self.predictor, 'pool', cell_means)(x_BCHW, size)

    def predict(
        self,
        cells_BNC: Tensor,
        hw: tuple[int, int],
        cell_size: int = 1,
        index: int = 0,
        predictor: nn.Module | None = None,
        among_BN: Tensor | None = None,
    ) -> Decision:
        """Decide by a predictor: one that learns samples in training mode, else it selects.

        What a predictor learns does not change the features it looks at: gradients end there.

        Args:
            cells_BNC: What ``cells`` returns.
            hw: Height and width of the map, in locations.
            cell_size: Side of a cell, in locations. Defaults to 1.
            index: Number of the decision. Defaults to 0.
            predictor: Defaults to None, the decider's own.
            among_BN: 1 for the cells that may be kept, 0 for others. Defaults to None, all.
        """
        predictor = predictor or self.predictor
        with region('predictor'):
            log_probs = predictor(cells_BNC.detach())
        return self.decide(log_probs, hw, cell_size, index, predictor.training, among_BN=among_BN)

    def decide(
        self,
        log_probs_BN2: Tensor,
        hw: tuple[int, int],
        cell_size: int = 1,
        index: int = 0,
        sample: bool = False,
        exact: bool = False,
        among_BN: Tensor | None = None,
    ) -> Decision:
        """Decide by scores: sample at the keep ratio, or select.

        Args:
            log_probs_BN2: (B, N, 2) log-probabilities [keep, drop].
            hw: Height and width of the map, in locations.
            cell_size: Side of a cell, in locations. Defaults to 1.
            index: Number of the decision. Defaults to 0.
            sample: Whether to sample, with a gradient, if there is something to learn. Defaults to
                False.
            exact: Whether a sample keeps exactly the keep ratio. Defaults to False.
            among_BN: 1 for the cells that the decision before kept, 0 for others; no others are
                kept. Defaults to None, all.
        """
        sample = sample and self.learns
        ratio, selector = self.keep_ratios[index], self.sparsity.selector
        if sample:
            if self.serves_all:
                log_probs_BN2, exact = _centred(log_probs_BN2), True
            self._warn_without_loss(ratio, exact)
            return sample_decision(log_probs_BN2, hw, ratio, selector, cell_size, exact, among_BN)
        if ratio >= 1:
            everything = keep_all(log_probs_BN2.shape[0], hw, log_probs_BN2.device, cell_size)
            return everything._replace(scores=log_probs_BN2[..., 0].float())
        among_ratio = 1.0 if among_BN is None else self.keep_ratios[index - 1]
        return select_decision(
            log_probs_BN2, hw, ratio, selector, cell_size, among_BN, among_ratio, place=index
        )

    def decide_early(self, inputs: Sequence[Tensor], hw: tuple[int, int]) -> Decision | None:
        """Return a neck's or head's decision if it can be made before anything is computed.

        It can if everything is kept, and if the backbone's predictors are followed. Of the
        backbone's decisions the last one whose cells are no larger is taken, or else the finest;
        where the backbone keeps everything without looking, so is here. Scores of a predictor that
        learns are sampled, exactly at the keep ratio: they were learned at another one.

        Args:
            inputs: What the neck or head gets.
            hw: Height and width of the map that the decision is about.

        Raises:
            ValueError: If the backbone's predictors are to be followed, and the inputs carry no
                decisions.
        """
        everything = keep_all(inputs[0].shape[0], hw, inputs[0].device, self.sparsity.cell_size)
        if self.keeps_all(learns=self.training and self.predictor is not None):
            return everything
        if not self.follows:
            return None
        decisions = decisions_of(inputs)
        if not decisions:
            raise ValueError(
                "sparsity.predictor 'backbone' needs feature maps that carry decisions, from a "
                'sparse backbone and with no neck in between that leaves them behind, got a '
                f'{type(inputs).__name__} of maps without'
            )
        source = _last_fine(decisions, everything.grid)
        learns = source.mask.requires_grad
        if source.keeps_all and not learns:
            return everything
        scores = _cell_scores(source, hw, self.sparsity.cell_size)
        sample = self.training and learns
        return self.decide(scores, hw, self.sparsity.cell_size, sample=sample, exact=sample)

    def plan(self, decision: Decision) -> Plan:
        """Choose how a neck or head executes its decision."""
        return plan(decision, self.execution, self.training, of_cells=True)

    def forward(self, decisions: Sequence[Decision]) -> None:
        """Show the decisions of a whole forward, which has come to its end, to hooks and users."""
        self.decisions = () if is_exporting() else tuple(decisions)

    def _check_predictor(self, predictor: Mapping) -> None:
        # Tokens that come back have no attention to go by; only vision transformers fall.
        if self.reads == 'attention' and not self.falling:
            raise ValueError(
                'sparsity.predictor may be an AttentionScore in a SparseVisionTransformer with '
                f'reactivate=False only, got {dict(predictor)} elsewhere'
            )
        if not self.learns and self.sparsity.selector == 'threshold':
            raise ValueError(
                "sparsity.selector must not be 'threshold', which needs a learned P(keep), with "
                f"the predictor {dict(predictor)}, got 'threshold'"
            )

    def _warn_without_loss(self, ratio: float, exact: bool) -> None:
        if torch.compiler.is_compiling():  # a message would break the graph
            return
        if ratio < 1 and not exact and not self.has_ratio_loss and not self._warned:
            self._warned = True
            print_log(
                'A sparse part trains without a ratio loss, so nothing holds its keep rate: add '
                "custom_hooks=[dict(type='mmdynsparse.SparsityHook')] to the config.",
                logger='current',
                level=logging.WARNING,
            )

    def __getstate__(self) -> dict:
        """Copies and pickles leave the last decisions, and their graph, behind."""
        return {**super().__getstate__(), 'decisions': ()}

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.budgets and hasattr(destination, '_metadata'):
            destination._metadata[prefix[:-1]]['budgets'] = self.budgets

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, local_metadata: dict, *args
    ) -> None:
        self.budgets = dict(local_metadata.get('budgets', self.budgets))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def deciders(model: nn.Module) -> dict[str, Decider]:
    """Find the sparse parts of a model.

    Returns:
        The decider of each part, by the part's name in the model, in the order of the model.
    """
    return {
        name.removesuffix('decider').removesuffix('.'): module
        for name, module in model.named_modules()
        if isinstance(module, Decider) and module.keep_ratios
    }


def keep_ratios(model: nn.Module) -> list[float]:
    """Return the keep ratios of all decisions of a model, in the order of its parts."""
    return [ratio for decider in deciders(model).values() for ratio in decider.keep_ratios]


def set_keep_ratio(
    model: nn.Module, keep_ratio: float | Mapping[str, float | Sequence[float]]
) -> None:
    """Change the keep ratios of a built model.

    Args:
        model: The model, which is not changed if a ratio is not valid.
        keep_ratio: A number in (0, 1] for all sparse parts, 1.0 is the dense model; or what
            :meth:`Decider.check` takes by the name of each part that changes, such as
            ``dict(backbone=0.7, decode_head=0.3)``.

    Raises:
        ValueError: If the model has no sparse part and shall not keep everything, or none of a
            name, or a ratio is not valid.
    """
    parts = deciders(model)
    if not parts and keep_ratio != 1:
        raise ValueError(
            f'keep_ratio needs a model with a sparse part, got a {type(model).__name__}'
        )
    ratios = keep_ratio if isinstance(keep_ratio, Mapping) else dict.fromkeys(parts, keep_ratio)
    if unknown := sorted(set(ratios) - set(parts)):
        raise ValueError(f'keep_ratio must be of the sparse parts {list(parts)}, got {unknown}')
    checked = {name: parts[name].check(ratio) for name, ratio in ratios.items()}
    for name, ratio in checked.items():
        parts[name].keep_ratios = ratio


def build_part(cfg: dict, embed_dims: int) -> nn.Module:
    """Build a predictor or fast path for ``embed_dims`` channels."""
    return MODELS.build({**cfg, 'embed_dims': embed_dims})


def _centred(log_probs_BN2: Tensor) -> Tensor:
    """Shift the log-odds of each image to a mean of 0, so that nothing learns to keep more."""
    odds_BN = log_probs_BN2[..., 0] - log_probs_BN2[..., 1]
    odds_BN = odds_BN - odds_BN.mean(1, keepdim=True)
    return F.logsigmoid(torch.stack((odds_BN, -odds_BN), -1))


def _last_fine(decisions: Sequence[Decision], grid: tuple[int, int]) -> Decision:
    """Return the last decision that is at least as fine as a grid, or else the finest."""
    best = decisions[0]
    for decision in decisions[1:]:
        if all(n >= min(m, k) for n, m, k in zip(decision.grid, best.grid, grid, strict=True)):
            best = decision
    return best


def _cell_scores(decision: Decision, hw: tuple[int, int], cell_size: int) -> Tensor:
    """Return log-probabilities (B, N, 2) of the cells of a map from a decision's scores.

    Strides are powers of two. Cells at the right and bottom edge may then reach beyond the map;
    others are taken to divide it evenly.
    """
    (rows, columns), stride = decision.grid, 1
    while stride * decision.hw[0] < hw[0] or stride * decision.hw[1] < hw[1]:
        stride *= 2
    side = stride * decision.cell_size  # of the decision's cells, on the map
    if cell_grid(hw, side) != (rows, columns):
        new_hw, size = hw, cell_size
    elif cell_size % side:
        new_hw, size = (rows * side, columns * side), cell_size
    else:
        new_hw, size = (rows, columns), cell_size // side
    scores = resize_scores(decision.scores, (rows, columns), new_hw, size)
    rows, columns = cell_grid(hw, cell_size)
    return scores.unflatten(1, cell_grid(new_hw, size))[:, :rows, :columns].flatten(1, 2)


def _part_type(cfg: Mapping) -> type | None:
    return MODELS.get(cfg['type']) if isinstance(cfg['type'], str) else cfg['type']
