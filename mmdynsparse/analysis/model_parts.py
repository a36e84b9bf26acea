"""The parts of an mmseg or mmdet model as functions that can be timed."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..engine.distillation import is_single

MODEL_PARTS = ('backbone', 'neck', 'head', 'whole')


def available_parts(model: nn.Module) -> tuple[str, ...]:
    """Return which of ``MODEL_PARTS`` a model has."""
    parts = {'neck': getattr(model, 'neck', None), 'head': _head(model)}
    return tuple(name for name in MODEL_PARTS if parts.get(name, model) is not None)


def tensor_modules(model: nn.Module) -> list[nn.Module]:
    """Return the parts that are functions of tensors alone, and so may be compiled or captured."""
    names = ('backbone', 'neck', 'decode_head')
    return [getattr(model, name) for name in names if is_single(model, name)]


def part_calls(
    model: nn.Module, parts: Sequence[str], data: dict, dtype: torch.dtype = torch.float32
) -> dict[str, Callable[[], object]]:
    """Return a function without arguments for each part of a model.

    'backbone' and 'neck' compute features. 'head' is the head on recorded features: the logits of
    a segmentor; the predictions, post-processing included, of a detector. 'whole' is ``test_step``
    on the images, with pre- and post-processing.

    Args:
        model: The model, in eval mode, as ``to_device`` has left it.
        parts: Some of ``available_parts(model)``.
        data: As a data loader gives it.
        dtype: That of ``to_device``; if it is not float32 the calls run under autocast, as mixed
            precision of mmengine does, without which mmseg and mmdet mix dtypes. Defaults to
            float32.
    """
    device = next(model.parameters()).device.type
    mixed = torch.autocast(device, dtype, enabled=dtype != torch.float32)
    with torch.no_grad(), mixed:
        processed = model.data_preprocessor(data, False)
        images, samples = processed['inputs'], processed['data_samples']
        calls = {'whole': partial(model.test_step, data)}
        calls['backbone'] = partial(model.backbone, images)
        if {'neck', 'head'} & set(parts):
            features = model.backbone(images)
            if getattr(model, 'neck', None) is not None:
                calls['neck'] = partial(model.neck, features)
                features = model.neck(features)
            calls['head'] = partial(_head(model), features, samples)
    return {part: calls[part] if dtype == torch.float32 else mixed(calls[part]) for part in parts}


def to_device(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Move a model, and convert its weights, but not the normalization of images, to a dtype."""
    model.to(device)
    for name, part in model.named_children():
        if name != 'data_preprocessor':
            part.to(dtype)

    def cast(module: nn.Module, args: tuple, out: dict) -> dict:
        return {**out, 'inputs': out['inputs'].to(dtype)}

    if dtype != torch.float32:
        model.data_preprocessor.register_forward_hook(cast)


def _head(model: nn.Module) -> Callable[[Sequence[Tensor], list], object] | None:
    """Return the head as a function of features and data samples."""
    if hasattr(model, 'roi_head') and hasattr(model, 'rpn_head'):
        return partial(_two_stage, model)
    if hasattr(model, 'bbox_head'):
        return model.bbox_head.predict
    if is_single(model, 'decode_head'):
        return lambda features, samples: model.decode_head(features)
    return None


def _two_stage(model: nn.Module, features: Sequence[Tensor], samples: list) -> list:
    proposals = model.rpn_head.predict(features, samples, rescale=False)
    return model.roi_head.predict(features, proposals, samples, rescale=False)
