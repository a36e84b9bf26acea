"""Checks of a user's files, made before a run starts.

Every check raises a ``ValueError`` that names the argument, what is allowed and what was received.
"""

import os.path as osp
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence

from mmengine.config import Config
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import CheckpointLoader, Runner
from mmengine.utils import is_abs
from torch import Tensor, nn

# Parts of the names of parameters that no dense checkpoint has.
NEW_PARTS = ('.predictors.', '.predictor.', '.fast_path.')
# Tensors of a backbone that do not make it another one: output norms, which depend on
# ``out_indices``, classifiers, and what follows from the window size.
OPTIONAL = re.compile(
    r'^(norm\d|fc|head)\.|(relative_position_index|attn_mask|num_batches_tracked)$'
)
INIT_CFG = re.compile(r'\.init_cfg(\[\d+\])?$')


def is_new(name: str, parts: Sequence[str] = NEW_PARTS) -> bool:
    """Returns whether a parameter of this name is in one of the parts that are new."""
    return any(part in f'.{name}' for part in parts)


def check_checkpoint(argument: str, path: str, resume: bool = False) -> dict:
    """Checks that a checkpoint can be loaded.

    Args:
        argument: Name of the argument for the message.
        path: Path of the file, or an address with a scheme such as ``https://``, which is not
            looked at.
        resume: Whether training is to continue from it. Defaults to False.

    Returns:
        What the file holds; an empty dict for an address.

    Raises:
        ValueError: If the file is missing or corrupt, is no dict, or is to be resumed from and
            holds weights only.
    """
    if '://' in path:
        return {}
    if not osp.isfile(osp.expanduser(path)):
        raise ValueError(f'{argument} must be an existing checkpoint, got {path!r}')
    try:
        checkpoint = CheckpointLoader.load_checkpoint(path, map_location='cpu')
    except Exception as error:
        reason = str(error).split('\n')[0][:200]
        raise ValueError(
            f'{argument} must be a checkpoint that torch.load can read, got {path!r}, which is '
            f'corrupt or of another format ({type(error).__name__}: {reason})'
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f'{argument} must hold a dict of weights, got a {type(checkpoint).__name__} in {path!r}'
        )
    if resume and not {'meta', 'message_hub'} <= checkpoint.keys():
        raise ValueError(
            f'{argument} must be a checkpoint of a training run (with meta and message_hub) to '
            f'resume from, got only weights in {path!r}; load them with load_from'
        )
    return checkpoint


def read_checkpoint(argument: str, path: str) -> dict:
    """Read a checkpoint, from an address too.

    Args:
        argument: Name of the argument for the message.
        path: As of :func:`check_checkpoint`.

    Raises:
        ValueError: As :func:`check_checkpoint`.
    """
    return check_checkpoint(argument, path) or CheckpointLoader.load_checkpoint(path, 'cpu')


def check_training_inputs(cfg: Config) -> None:
    """Checks the files that a training run reads: datasets, annotations and checkpoints.

    Args:
        cfg: The config of the run.

    Raises:
        ValueError: If one is missing or corrupt.
    """
    for split in ('train', 'val'):
        check_data(cfg, split)
    for name, path in _pretrained_files(cfg.get('model') or {}, 'model'):
        check_checkpoint(name, path)
    # What a sharded training writes is a folder with a part of the model for each process.
    sharded = cfg.get('runner_type') == 'FlexibleRunner' and osp.isdir(cfg.get('load_from') or '')
    if cfg.get('load_from') and not sharded:
        argument = 'checkpoint to resume from' if cfg.get('resume') else 'load_from'
        check_checkpoint(argument, cfg.load_from, resume=bool(cfg.get('resume')))


def _pretrained_files(node: object, name: str) -> Iterator[tuple[str, str]]:
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        child = f'{name}[{key}]' if isinstance(key, int) else f'{name}.{key}'
        if isinstance(value, (dict, list, tuple)):
            yield from _pretrained_files(value, child)
        elif isinstance(value, str) and (
            key == 'pretrained' or (key == 'checkpoint' and INIT_CFG.search(name))
        ):
            yield child, value


def check_data(cfg: Config, split: str) -> None:
    """Checks that the folders and annotation files of a split exist.

    Args:
        cfg: The config.
        split: 'train', 'val' or 'test'.

    Raises:
        ValueError: If one is missing.
    """
    name = f'{split}_dataloader.dataset'
    dataset = (cfg.get(f'{split}_dataloader') or {}).get('dataset')
    for leaf_name, leaf in _leaf_datasets(dataset, name):
        _check_dataset(leaf, leaf_name)
    evaluators = cfg.get(f'{split}_evaluator') or []
    for evaluator in [evaluators] if isinstance(evaluators, dict) else evaluators:
        ann_file = evaluator.get('ann_file')
        if _is_local(ann_file, evaluator) and not osp.exists(ann_file):
            raise ValueError(
                f'{split}_evaluator.ann_file must be an existing file, got {ann_file!r}'
            )


def _leaf_datasets(dataset: object, name: str) -> Iterator[tuple[str, dict]]:
    """Walks through wrappers such as RepeatDataset and ConcatDataset."""
    if not isinstance(dataset, dict):
        return
    if 'datasets' in dataset:
        for i, child in enumerate(dataset['datasets']):
            yield from _leaf_datasets(child, f'{name}.datasets[{i}]')
    elif 'dataset' in dataset:
        yield from _leaf_datasets(dataset['dataset'], f'{name}.dataset')
    else:
        yield name, dataset


def _check_dataset(dataset: dict, name: str) -> None:
    root = dataset.get('data_root') or ''
    entries = {'ann_file': dataset.get('ann_file', '')}
    for key, value in (dataset.get('data_prefix') or {}).items():
        entries[f'data_prefix.{key}'] = value
    entries = {key: value for key, value in entries.items() if isinstance(value, str)}
    root_is_used = any(not is_abs(value) for value in entries.values())
    if root_is_used and _is_local(root, dataset) and not osp.isdir(root):
        raise ValueError(f'{name}.data_root must be an existing folder, got {root!r}')
    for key, value in entries.items():
        path = osp.join(root, value)
        if value and _is_local(path, dataset) and not osp.exists(path):
            kind = 'file' if key == 'ann_file' else 'folder'
            raise ValueError(f'{name}.{key} must be an existing {kind}, got {path!r}')


def _is_local(path: object, node: dict) -> bool:
    backend = (node.get('backend_args') or {}).get('backend', 'local')
    return isinstance(path, str) and path != '' and backend == 'local' and not _has_scheme(path)


def _has_scheme(path: str) -> bool:
    return '://' in path or path.startswith('s3:')


def check_not_empty(runner: Runner, split: str) -> None:
    """Builds a dataset and checks that it has images.

    Args:
        runner: The runner of the training or test.
        split: 'train', 'val' or 'test'.

    Raises:
        ValueError: If it has none.
    """
    try:
        size = len(getattr(runner, f'{split}_dataloader').dataset)
    except ValueError as error:
        # This is how mmengine's BaseDataset fails to pack a list of no images.
        if 'need at least one array to concatenate' not in str(error):
            raise
        size = 0
    if size == 0:
        raise ValueError(
            f'{split}_dataloader.dataset must hold at least 1 image, got 0: see its data_prefix, '
            'img_suffix, filter_cfg and metainfo.classes'
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
    theirs = {key: value for key, value in theirs.items() if matters(key)}
    # By loading, because some backbones fit tensors of another window or image size.
    faults = _load_weights(model.backbone, theirs)
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
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    metadata = getattr(weights, '_metadata', {})
    weights = OrderedDict((key.removeprefix('module.'), value) for key, value in weights.items())
    weights._metadata = metadata  # layers read their version from it to migrate old keys
    missing, unexpected, reshaped = _load_weights(model, weights)
    missing = [key for key in missing if not key.endswith('num_batches_tracked')]
    if _runs_dense(model):
        missing, unexpected = (
            [key for key in keys if not is_new(key)] for keys in (missing, unexpected)
        )
    if missing or unexpected or reshaped:
        faults = _describe(missing, unexpected, reshaped)
        raise ValueError(f"checkpoint must fit the config's model, got {path!r} with {faults}")


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


def _runs_dense(model: nn.Module) -> bool:
    ratios = [r for m in model.modules() for r in getattr(m, 'keep_ratios', ())]
    return all(ratio == 1 for ratio in ratios)
