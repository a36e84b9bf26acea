"""The time of a training iteration beside that of the dense original."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS
from torch import Tensor, nn

from ..engine import distillation
from ..engine.hooks.sparsity_hook import sparsity_losses
from ..models.calls import CallRecorder
from ..models.decider import deciders, set_keep_ratio
from .dense import Pair
from .latency import compare_latency


def compare_training(pair: Pair, batch: dict, rounds: int, warmup: int) -> list[dict]:
    """Time forward and backward passes of both models alternately.

    An iteration is preprocessing, the losses, for the sparse model with those of
    ``SparsityHook``, and the backward pass; the optimizer's update is left out. In between, what a
    teacher adds to an iteration is timed: a forward pass up to the logits, without gradients, of
    the dense model and of the sparse one that keeps everything. Detectors of two stages look at
    regions that they have sampled for the batch.

    Args:
        pair: Both models on one device.
        batch: As a data loader gives it.
        rounds: Timed iterations of each model, at least 1.
        warmup: Iterations before them.

    Returns:
        For 'dense', 'sparse', 'dense forward' and 'teacher', the forward of teacher='self': model,
        median, p10, p90 (ms) and ratio, the median divided by that of 'dense'.
    """
    teachers = {'dense forward': deepcopy(pair.dense), 'teacher': deepcopy(pair.sparse)}
    models = {'dense': pair.dense, 'sparse': pair.sparse}
    steps = {name: training_step(model, batch) for name, model in models.items()}
    two_stages = distillation.is_two_stage(pair.dense)
    rois = sampled_rois(pair.dense, batch) if two_stages else None
    steps |= {name: teacher_step(model, batch, rois) for name, model in teachers.items()}
    latencies = compare_latency(steps, rounds, warmup)
    dense_ms = latencies['dense'].median
    return [
        dict(model=name, **latency._asdict(), ratio=latency.median / dense_ms)
        for name, latency in latencies.items()
    ]


def training_step(model: nn.Module, batch: dict) -> Callable[[], None]:
    """Return a function that does one training iteration without the update."""
    # As a training of one process does; synchronised norms need CUDA.
    model = revert_sync_batchnorm(model)
    model.train()
    parts = list(deciders(model).values())
    for decider in parts:
        decider.has_ratio_loss = True

    @torch.enable_grad()
    def step() -> None:
        data = model.data_preprocessor(deepcopy(batch), True)  # it pads labels in place
        losses = model(**data, mode='loss')
        decisions = [decision for decider in parts for decision in decider.decisions]
        losses |= sparsity_losses(decisions, 10.0)
        model.parse_losses(losses)[0].backward()
        model.zero_grad()

    return step


def sampled_rois(model: nn.Module, batch: dict) -> Tensor:
    """Return the regions (R, 5) that a detector samples from a batch in training."""
    names = (distillation.ROI_INPUT, distillation.ROI)
    recorder = CallRecorder({name: model.get_submodule(name) for name in names})
    data = model.data_preprocessor(deepcopy(batch), True)
    with torch.no_grad():
        calls = recorder.record(partial(model, **data, mode='loss'))
    return distillation.second_stage(calls)[1]


def teacher_step(model: nn.Module, batch: dict, rois: Tensor | None) -> Callable[[], None]:
    """Return a function that runs a model as ``DistillationHook`` runs its teacher."""
    set_keep_ratio(model, 1.0)
    model.eval()
    images = model.data_preprocessor(deepcopy(batch), True)['inputs']
    heads = (distillation.SEGMENTOR, distillation.RPN)
    return torch.no_grad()(partial(distillation.run_parts, model, images, heads, rois))


def training_batch(cfg: Config, size: int) -> dict:
    """Load the first images of a config's training set, augmented.

    Raises:
        ValueError: If there are fewer.
    """
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    if len(dataset) < size:
        raise ValueError(
            f'train_dataloader.dataset must hold at least {size} images, got {len(dataset)}'
        )
    return pseudo_collate([dataset[i] for i in range(size)])
