"""What a drafted sparse model costs beside the dense one."""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from ..analysis.flops import count_macs
from ..analysis.images import image_batch
from ..analysis.latency import Latency, compare_latency
from .build import Draft

SIZES = dict(mmseg=(512, 512), mmdet=(800, 1280))  # px


class Measured(NamedTuple):
    """GMACs of one image and, where it was measured, the latency of one call."""

    gmacs: dict[str, float]
    latency: dict[str, Latency]


def default_size(draft: Draft) -> tuple[int, int]:
    """Return height and width (px) of the images that a model is meant for.

    That is the crop of a segmentor's config, or the test scale of a detector's, at most 800 x 1280.
    """
    size = (draft.cfg['model'].get('data_preprocessor') or {}).get('size')
    if draft.scope == 'mmseg':
        return tuple(size) if size else SIZES['mmseg']
    scales = [step.get('scale') for step in _test_pipeline(draft.cfg)]
    scale = next((s for s in scales if isinstance(s, list | tuple)), SIZES['mmdet'])
    return tuple(map(min, SIZES['mmdet'], sorted(scale)))


def noise(draft: Draft, hw: tuple[int, int]) -> dict:
    """Return one image of noise as a data loader gives it."""
    return image_batch(1, hw, draft.scope)


def gmacs(model: nn.Module, data: dict) -> float:
    """Return the multiply-adds of a model on a batch, in 1e9."""
    return count_macs(partial(model.test_step, data)) / 1e9


def measure(models: Mapping[str, nn.Module], data: dict, rounds: int) -> Measured:
    """Count the multiply-adds of models, and time them alternately.

    Args:
        models: In eval mode, by name.
        data: A batch of images.
        rounds: Timed calls of each; 0 for none.
    """
    counts = {name: gmacs(model, data) for name, model in models.items()}
    if rounds == 0:
        return Measured(counts, {})
    calls = {name: partial(model.test_step, data) for name, model in models.items()}
    with torch.no_grad():
        return Measured(counts, compare_latency(calls, rounds, warmup=2))


def _test_pipeline(cfg: Mapping) -> list[Mapping]:
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    return dataset.get('pipeline') or []
