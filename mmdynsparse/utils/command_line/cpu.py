"""Adapts a config that was written for GPUs to a machine that has none."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from torch import nn

SYNC_BN_TYPES = ('SyncBN', 'MMSyncBN')


class BFloat16OptimWrapper(OptimWrapper):
    """Mixed precision on the CPU, where mmengine's ``AmpOptimWrapper`` refuses to be built.

    The forward pass runs under autocast to bfloat16. Its exponent is as wide as that of float32,
    so no loss scaling is needed. Arguments are those of ``OptimWrapper``.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Wraps the forward pass of one training step."""
        with super().optim_context(model), torch.autocast('cpu', dtype=torch.bfloat16):
            yield


def adapt_to_cpu(cfg: Config) -> None:
    """Changes a config so that it runs without an accelerator; does nothing where there is one.

    Mixed precision becomes bfloat16. With a launcher, the gloo process group is created here,
    because mmengine's own set-up needs CUDA and keeps a group that exists, and synchronised batch
    norm becomes plain batch norm, because it has no CPU implementation.

    Args:
        cfg: The config with ``launcher`` set, changed in place.

    Raises:
        ValueError: If the launcher is neither 'none' nor 'pytorch'.
    """
    if get_device() != 'cpu':
        return
    optim_wrapper = cfg.get('optim_wrapper') or {}
    if optim_wrapper.get('type') == 'AmpOptimWrapper':
        _use_bfloat16(optim_wrapper, cfg.get('default_scope'))
    if cfg.launcher != 'none':
        _init_gloo(cfg.launcher)
        _unsync_batch_norm(cfg)
        wrapper = cfg.get('model_wrapper_cfg') or dict(
            type='MMDistributedDataParallel',
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        )
        wrapper['device_ids'] = None
        cfg.model_wrapper_cfg = wrapper


def _use_bfloat16(optim_wrapper: dict, scope: str | None) -> None:
    for key in ('loss_scale', 'dtype', 'use_fsdp'):
        optim_wrapper.pop(key, None)
    if scope == 'mmdet':
        optim_wrapper['type'] = 'OptimWrapper'
        _warn(
            'mixed precision is ignored, training runs in float32: RoIAlign and NMS of mmcv have '
            'no bfloat16 on the CPU.'
        )
    else:
        optim_wrapper['type'] = f'{__name__}.{BFloat16OptimWrapper.__name__}'


def _init_gloo(launcher: str) -> None:
    if launcher != 'pytorch':
        raise ValueError(
            f"--launcher must be 'none' or 'pytorch' on a machine without CUDA, got {launcher!r}"
        )
    if not dist.is_initialized():
        dist.init_process_group('gloo')


def _unsync_batch_norm(cfg: Config) -> None:
    replaced = sum([_replace_sync_bn(cfg.get('model') or {}), cfg.pop('sync_bn', None) is not None])
    if replaced and os.environ.get('RANK', '0') == '0':
        _warn(
            'SyncBN has no CPU implementation and is replaced by BN: statistics are those of one '
            "process, whose batch needs at least 2 images where a layer's map is 1 x 1."
        )


def _replace_sync_bn(node: object) -> int:
    children = node.values() if isinstance(node, dict) else node
    replaced = sum(_replace_sync_bn(c) for c in children if isinstance(c, (dict, list, tuple)))
    if isinstance(node, dict) and node.get('type') in SYNC_BN_TYPES:
        node['type'] = 'BN'
        replaced += 1
    return replaced


def _warn(message: str) -> None:
    print_log(message, logger='current', level=logging.WARNING)
