"""What keep ratios cost and how much they change a model's outputs, and budgets that follow."""

import contextlib
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from rich.progress import Progress
from torch import nn

from ..engine.distillation import RPN, SEGMENTOR, Batch, logit_heads, logit_loss, run_parts
from ..models.calls import CallRecorder
from ..models.decider import deciders, set_keep_ratio
from .budget_search import GRID, Table, by_part, differences, evolve, find_groups, monotone, probe
from .dense import Pair
from .flops import count_macs
from .images import test_dataset
from .latency import compare_latency
from .report import write_json

COSTS = ('latency', 'gmacs')
WARMUP = 2  # calls of each variant before the timed ones
# Budgets are timed more often than the entries of a table, and corrected until they are this close.
FINAL_ROUNDS = 3
TOLERANCE = 0.03
CORRECTIONS = 3
# Logit of an anchor that a sparse RPN head leaves out, which is -inf when it runs.
LEAST_LOGIT = -10.0


class Divergence:
    """Mean divergence of a model's predictions from those with everything kept.

    It compares the logits of a segmentor's pixels, or of a detector's anchors and of the regions
    that it proposes with everything kept. Images are not cut into windows, whatever ``test_cfg``
    says.

    Args:
        model: In eval mode.
        batches: Of images, as a data loader gives them. Labels are not needed.

    Raises:
        ValueError: If the model's logits cannot be compared.
    """

    name, sign = 'divergence', 1

    @torch.no_grad()
    def __init__(self, model: nn.Module, batches: Sequence[dict]) -> None:
        try:
            self._heads = logit_heads(model)
        except ValueError:
            raise ValueError(
                'a divergence needs a segmentor with one decode_head that returns a map of '
                f'logits, or a detector of two stages with one head each, got '
                f'{type(model).__name__}: name a --metric instead'
            ) from None
        self._model = model
        self._recorder = CallRecorder({name: model.get_submodule(name) for name in self._heads})
        set_keep_ratio(model, 1.0)
        self._batches = [self._prepared(data) for data in batches]
        self._targets = [self._outputs(batch) for batch in self._batches]

    @torch.no_grad()
    def __call__(self) -> float:
        """Return the divergence, in nats, of the model as it is."""
        losses = []
        for batch, targets in zip(self._batches, self._targets, strict=True):
            for name, out in self._outputs(batch).items():
                head = self._model.get_submodule(name)
                losses.append(logit_loss(name, head, out, targets[name], batch, 1.0).item())
        return sum(losses) / len(self._batches)

    def _prepared(self, data: dict) -> Batch:
        processed = self._model.data_preprocessor(data, False)
        images, samples = processed['inputs'], processed['data_samples']
        if SEGMENTOR in self._heads:
            return Batch(images)  # all pixels count, there are no labels
        from mmdet.structures.bbox import bbox2roi  # a detector has mmdet

        features = self._model.extract_feat(images)
        proposals = self._model.rpn_head.predict(features, samples, rescale=False)
        return Batch(images, samples, bbox2roi([p.bboxes for p in proposals]))

    def _outputs(self, batch: Batch) -> dict[str, object]:
        run = partial(run_parts, self._model, batch.images, self._heads, batch.rois)
        outputs = {call.name: call.out for call in self._recorder.record(run)}
        if RPN in outputs:
            scores, deltas = outputs[RPN]
            outputs[RPN] = [x.clamp(min=LEAST_LOGIT) for x in scores], deltas
        return outputs


class MetricLoss:
    """A metric of the config's test evaluator, with the sign changed.

    Args:
        model: In eval mode.
        batches: Of the config's test set.
        cfg: The config.
        name: Of the metric, the higher the better, as the evaluator calls it.

    Raises:
        ValueError: If there is no evaluator, or it has no metric of that name.
    """

    sign = -1

    def __init__(self, model: nn.Module, batches: Sequence[dict], cfg: Config, name: str) -> None:
        if not cfg.get('test_evaluator'):
            raise ValueError('--metric needs a test_evaluator in the config, got none')
        MMLogger.get_current_instance().setLevel('WARNING')  # one table for each evaluation
        self.name, self._model, self._batches = name, model, batches
        self._evaluator = Evaluator(cfg.test_evaluator)
        self._evaluator.dataset_meta = test_dataset(cfg).metainfo
        self()  # a wrong name is reported before anything is measured

    @torch.no_grad()
    def __call__(self) -> float:
        """Return the metric of the model as it is, with the sign changed."""
        with contextlib.redirect_stdout(io.StringIO()):
            for data in self._batches:
                self._evaluator.process(self._model.test_step(data), data)
            metrics = self._evaluator.evaluate(len(self._batches))
        if self.name not in metrics:
            raise ValueError(f'--metric must be one of {tuple(metrics)}, got {self.name!r}')
        return -float(metrics[self.name])


class Notes:
    """Results of measurements in a file, from which a run that was stopped goes on.

    Args:
        path: The file. What it holds under another key is forgotten.
        key: Names all that results depend on.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.results: dict[str, object] = {}
        self.advance: Callable[[], object] = int  # is called after each result
        if path.exists():
            notes = json.loads(path.read_text())
            if notes['key'] == key:
                self.results = notes['results']

    def get(self, name: str, measure: Callable[[], object]) -> object:
        """Return the result of this name, which is measured if it is not there."""
        if name not in self.results:
            self.results[name] = measure()
            replace_json(dict(key=self.key, results=self.results), self.path)
        self.advance()
        return self.results[name]


class Measures:
    """Costs and losses of a model at given keep ratios, each measured once.

    Args:
        pair: The model and its dense original, in eval mode.
        batches: Of images.
        loss: Returns the loss of the sparse model as it is.
        notes: Keeps the results.
        rounds: Timed calls of each variant; they take the batches in turn.
    """

    def __init__(
        self,
        pair: Pair,
        batches: Sequence[dict],
        loss: Divergence | MetricLoss,
        notes: Notes,
        rounds: int,
    ) -> None:
        self.pair, self.batches, self._loss, self.notes = pair, batches, loss, notes
        self.rounds = rounds
        self.groups = find_groups(pair.sparse)
        self._deciders = deciders(pair.sparse)

    def loss(self, ratios: Sequence[float]) -> float:
        """Return the loss of ratios (D,) of the groups."""

        def measure() -> float:
            self._set(ratios)
            return self._loss()

        return self.notes.get(f'{self._loss.name} {_text(ratios)}', measure)

    def costs(self, kind: str, vectors: Sequence, rounds: int = 1) -> list[float]:
        """Return the costs of the dense original and of vectors of ratios.

        Args:
            kind: 'latency' (median in ms, of alternating calls) or 'gmacs' (mean of the images).
            vectors: Ratios (D,) of the groups.
            rounds: Times the rounds. Defaults to 1.
        """
        if kind == 'gmacs':
            return [float(np.mean(self.gmacs(ratios))) for ratios in (None, *vectors)]
        key = f'latency {rounds} x {", ".join(map(_text, vectors))}'
        return self.notes.get(key, partial(self._latency, vectors, rounds * self.rounds))

    def gmacs(self, ratios: Sequence[float] | None) -> list[float]:
        """Return the GMACs of each image at ratios (D,) of the groups; None is the original."""
        name = 'dense' if ratios is None else _text(ratios)
        return self.notes.get(f'gmacs {name}', partial(self._count, ratios))

    def shares(self, kind: str, vectors: Sequence, rounds: int = 1) -> list[float]:
        """Return costs of vectors of ratios, divided by those of the dense original."""
        dense, *costs = self.costs(kind, vectors, rounds)
        return [cost / dense for cost in costs]

    def table(self, kind: str, cheapest: float, whole: float) -> Table:
        """Measure the table of one cost.

        Args:
            kind: As of ``costs``.
            cheapest: Share of the least ratios. The table is scaled so that it adds up to it.
            whole: Share of everything kept.
        """
        grids = [[probe(self.groups, i, r) for r in GRID] for i in range(len(self.groups))]
        costs = np.array([self.shares(kind, grid) for grid in grids])
        losses = np.array([[self.loss(ratios) for ratios in grid] for grid in grids])
        added = monotone(differences(self.groups, costs))
        saved = -added[:, 0].sum()
        if saved > 0 and cheapest < whole:
            added *= (whole - cheapest) / saved
        return Table(self.groups, whole, added, differences(self.groups, losses))

    def corrected(self, kind: str, table: Table, ratios: np.ndarray, asked: float) -> np.ndarray:
        """Return ratios (D,) near the given ones whose measured cost is the share asked."""
        target, tried = asked, []
        for _ in range(1 + CORRECTIONS):
            (share,) = self.shares(kind, [ratios], FINAL_ROUNDS)
            tried.append((abs(share / asked - 1), tuple(ratios)))
            target *= asked / share
            new = table.fit(ratios, target)
            if tried[-1][0] < TOLERANCE or new is None or all(new == ratios):
                break
            ratios = new
        return np.array(min(tried)[1])

    def row(self, ratios: np.ndarray) -> dict[str, float]:
        """Return the costs, as shares of the dense ones, and the loss of ratios (D,).

        They are means over the images; ``gmacs_p95`` is the 95th percentile.
        """
        costs = {kind: self.shares(kind, [ratios], FINAL_ROUNDS)[0] for kind in COSTS}
        # An adaptive selector keeps more of some images than of others.
        high, dense = np.percentile(self.gmacs(ratios), 95), np.mean(self.gmacs(None))
        costs['gmacs_p95'] = float(high / dense)
        return {**costs, self._loss.name: self._loss.sign * self.loss(ratios)}

    def _set(self, ratios: Sequence[float]) -> None:
        for part, values in by_part(self.groups, ratios).items():
            self._deciders[part].set_keep_ratio(values)

    def _count(self, ratios: Sequence[float] | None) -> list[float]:
        model = self.pair.dense if ratios is None else self.pair.sparse
        if ratios is not None:
            self._set(ratios)
        return [count_macs(partial(model.test_step, data)) / 1e9 for data in self.batches]

    def _latency(self, vectors: Sequence, rounds: int) -> list[float]:
        calls = {'dense': partial(_next_step, self.pair.dense, cycle(self.batches))}
        for i, ratios in enumerate(vectors):
            calls[str(i)] = partial(self._step_at, ratios, cycle(self.batches))
        return [latency.median for latency in compare_latency(calls, rounds, WARMUP).values()]

    def _step_at(self, ratios: Sequence[float], batches: cycle) -> None:
        self._set(ratios)
        _next_step(self.pair.sparse, batches)


def search_budgets(
    measures: Measures, asked: Mapping[str, Sequence[float]], evaluations: int, seed: int = 0
) -> dict:
    """Find the keep ratios with the least loss for every cost that is asked.

    Args:
        measures: Costs and losses of the model.
        asked: Shares of the dense original's cost, in (0, 1], for some of ``COSTS``.
        evaluations: Vectors of ratios that are evaluated for each share.
        seed: Of the search. Defaults to 0.

    Returns:
        ``dense``, its cost, and ``budgets``: for each share, as text, the keep ratios of all
        parts, the measured costs, the loss, and the same of equal ratios (``uniform``).

    Raises:
        ValueError: If a share is below that of the least ratios.
    """
    groups, ends = measures.groups, {}
    least_and_all = [np.full(len(groups), GRID[0]), np.ones(len(groups))]
    for kind, shares in asked.items():
        ends[kind] = measures.shares(kind, least_and_all, FINAL_ROUNDS)
        if min(shares) < min(ends[kind]):
            raise ValueError(
                f'--{kind} must be at least {min(ends[kind]):.3f}, the share of the cheapest '
                f'model (all keep ratios at {GRID[0]}, or at 1), got {min(shares):g}'
            )
    total = (1 + len(asked)) * len(groups) * len(GRID)
    total += sum(map(len, asked.values())) * (evaluations + 4)
    budgets = {}
    with Progress() as progress:
        task = progress.add_task('measuring', total=total)
        measures.notes.advance = partial(progress.advance, task)
        for kind, shares in asked.items():
            table = measures.table(kind, *ends[kind])
            for share in shares:
                name = f'{share:g}' if kind == 'latency' else f'{kind}-{share:g}'
                budgets[name] = _budget(measures, kind, table, share, evaluations, seed)
        progress.update(task, completed=total)
    costs = [measures.costs(kind, least_and_all, FINAL_ROUNDS)[0] for kind in COSTS]
    return dict(dense=dict(zip(('ms', 'gmacs'), costs, strict=True)), budgets=budgets)


def _budget(
    measures: Measures, kind: str, table: Table, share: float, evaluations: int, seed: int
) -> dict:
    found = evolve(table, share, measures.loss, evaluations, seed)
    pair = (found, table.uniform(share))
    found, uniform = (measures.corrected(kind, table, ratios, share) for ratios in pair)
    if measures.loss(uniform) <= measures.loss(found):
        found = uniform
    same = dict(keep_ratio=float(uniform[0]), **measures.row(uniform))
    return dict(keep_ratios=by_part(measures.groups, found), **measures.row(found), uniform=same)


def replace_json(result: Mapping, path: Path) -> None:
    """Write a file so that it is there as a whole or not at all."""
    new = path.with_name(f'{path.name}.new')
    write_json(result, new)
    os.replace(new, path)


def _next_step(model: nn.Module, batches: cycle) -> None:
    model.test_step(next(batches))


def _text(ratios: Sequence[float]) -> str:
    return ' '.join(f'{ratio:g}' for ratio in ratios)
