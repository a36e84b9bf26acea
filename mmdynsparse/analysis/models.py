"""The models that an analysis tool is given."""

import argparse
from collections.abc import Sequence

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from ..utils.checkpoints import check_weights, is_new, read_checkpoint
from ..utils.command_line.arguments import check_device
from ..utils.command_line.launch import load_config
from .dense import Pair, build_pair, share_weights
from .model_parts import to_device


def load_models(args: argparse.Namespace, dtype: torch.dtype) -> tuple[Config, Pair]:
    """Build the model of the config and its dense original, on the device and with their weights.

    Args:
        args: Arguments of an ``AnalysisParser``.
        dtype: Of weights and features.

    Raises:
        ValueError: If the config, the device or the checkpoint cannot be used.
    """
    cfg = load_config(args)
    device = check_device(args.device)
    init_default_scope(cfg.default_scope)
    torch.manual_seed(args.seed)
    pair = build_pair(cfg.model)
    if args.checkpoint:
        load_weights(pair.sparse, args.checkpoint)
        share_weights(pair.sparse, pair.dense)
    for model in (pair.sparse, pair.dense):
        to_device(model, device, dtype)
    return cfg, pair


def load_weights(model: nn.Module, path: str) -> None:
    """Load a checkpoint into a sparse model; predictors that a dense one lacks stay random.

    Args:
        model: The model.
        path: File or address of the checkpoint.

    Raises:
        ValueError: If the checkpoint cannot be read or is of another model.
    """
    checkpoint = read_checkpoint('checkpoint', path)
    weights = checkpoint.get('state_dict', checkpoint)
    fresh = {key: value for key, value in model.state_dict().items() if is_new(key)}
    if fresh and not any(is_new(key) for key in weights):
        print('a dense checkpoint: the predictors are random')
        weights.update(fresh)
    check_weights(model, weights, path)


def check_sizes(sizes: Sequence[tuple[int, int]], pair: Pair) -> None:
    """Check that images are not smaller than a patch of the backbone.

    Raises:
        ValueError: If one is.
    """
    convs = (m for m in pair.sparse.backbone.modules() if isinstance(m, nn.Conv2d))
    patch = next((max(conv.stride) for conv in convs), 1)  # the first convolution's stride
    for height, width in sizes:
        if min(height, width) < patch:
            raise ValueError(
                f'sizes must be at least one patch of the backbone, {patch} px, '
                f'got {height}x{width}'
            )
