"""Loading weights into a model, and refusing those of another one."""

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import Tensor, nn

from .convert import convert_checkpoint, shorten
from .files import read_checkpoint

# Parts of the names of gates, of which a search of operations has one optimizer group.
GATE_PARTS = ('.gate_logits',)
# Parts of the names of parameters that only a sparse model, or a search of operations, has.
NEW_PARTS = (
    *('.predictors.', '.predictor.', '.fast_path.'),
    *(*GATE_PARTS, '.head_logits', '.mix_norm'),
)
# Tensors of a backbone that do not make it another one: output norms, which depend on
# ``out_indices``, classifiers, and what follows from the window size.
OPTIONAL = re.compile(
    r'^(norm\d|fc|head)\.|(relative_position_index|attn_mask|num_batches_tracked)$'
)


def is_new(name: str, parts: Sequence[str] = NEW_PARTS) -> bool:
    """Return whether a parameter of this name is in one of the parts that are new."""
    return any(part in f'.{name}' for part in parts)


def load_pretrained(
    backbone: nn.Module, filename: str, source: str, optional: Callable[[str], bool]
) -> None:
    """Load a checkpoint into a backbone.

    Args:
        backbone: The module to load into.
        filename: Path or URL.
        source: As in :func:`convert_checkpoint`.
        optional: Says of a parameter's name whether the checkpoint may lack it.

    Raises:
        ValueError: If the file is missing or unreadable, or lacks or has keys it should not.
    """
    checkpoint = read_checkpoint('init_cfg.checkpoint', filename)
    keys = backbone.load_state_dict(convert_checkpoint(checkpoint, source), strict=False)
    missing = [k for k in keys.missing_keys if not optional(k)]
    if missing or keys.unexpected_keys:
        raise ValueError(
            f'init_cfg.checkpoint {filename!r} does not fit {type(backbone).__name__}: '
            f'missing {shorten(missing)}, unexpected {shorten(keys.unexpected_keys)}'
        )


def check_backbone(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Loads the backbone's weights that training starts from and refuses those of another one.

    Heads may differ, as those for other classes do, and so may the backbone's predictors, fast
    paths and output norms.

    Args:
        model: The bare model.
        weights: State dict, possibly of a model that was wrapped for distributed training.

    Raises:
        ValueError: If other tensors of the backbone are missing, left over or of another shape.
    """

    def matters(key: str) -> bool:
        return not is_new(key) and not OPTIONAL.search(key)

    pairs = ((key.removeprefix('module.'), value) for key, value in weights.items())
    theirs = {k.removeprefix('backbone.'): v for k, v in pairs if k.startswith('backbone.')}
    # By loading, because some backbones fit tensors of another window or image size.
    faults = _load_weights(model.backbone, {k: v for k, v in theirs.items() if matters(k)})
    faults = [[f'backbone.{key}' for key in keys if matters(key)] for keys in faults]
    if any(faults):
        raise ValueError(
            f"load_from must hold the weights of the model's {type(model.backbone).__name__}, "
            f'got {_describe(*faults)}'
        )


def check_weights(model: nn.Module, weights: Mapping[str, Tensor], path: str) -> None:
    """Loads weights into a model and refuses any that do not fit.

    Predictors and fast paths may be missing or left over in a model that keeps every location.

    Args:
        model: The model, possibly wrapped for distributed runs or test-time augmentation.
        weights: State dict of the bare model.
        path: Where the weights come from, for the message.

    Raises:
        ValueError: If keys are missing, unexpected or of another shape.
    """
    from ...models.decider import keep_ratios  # models load their weights through this module

    model = unwrap(model)
    metadata = getattr(weights, '_metadata', {})
    weights = OrderedDict((key.removeprefix('module.'), value) for key, value in weights.items())
    weights._metadata = metadata  # layers read their version from it to migrate old keys
    missing, unexpected, reshaped = _load_weights(model, weights)
    missing = [key for key in missing if not key.endswith('num_batches_tracked')]
    faults = [missing, unexpected, reshaped]
    if all(ratio == 1 for ratio in keep_ratios(model)):
        faults[:2] = ([key for key in keys if not is_new(key)] for keys in faults[:2])
    if any(faults):
        raise ValueError(
            f"checkpoint must fit the config's model, got {path!r} with {_describe(*faults)}"
        )


def unwrap(model: nn.Module) -> nn.Module:
    """Return a model without wrappers for distributed runs and test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def _load_weights(
    module: nn.Module, weights: Mapping[str, Tensor]
) -> tuple[list[str], list[str], list[str]]:
    """Load weights; return the keys that are missing, unexpected and of another shape."""
    try:
        return *module.load_state_dict(weights, strict=False), []
    except RuntimeError as error:
        # torch raises for shapes even with strict=False, after it has looked at every key.
        reshaped = re.findall(r'size mismatch for (\S+): ', str(error))
        if not reshaped:
            raise
        return [], [], reshaped


def _describe(missing: list[str], unexpected: list[str], reshaped: list[str]) -> str:
    kinds = ('missing keys', 'unexpected keys', 'keys of another shape')
    return ', '.join(
        f'{len(keys)} {kind} ({", ".join(keys[:4])}{", ..." if len(keys) > 4 else ""})'
        for keys, kind in zip((missing, unexpected, reshaped), kinds, strict=True)
        if keys
    )
