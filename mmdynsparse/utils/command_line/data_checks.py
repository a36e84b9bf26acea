"""Checks of the files that a config names, made before a run starts.

Every check raises a ``ValueError`` that names the argument, what is allowed and what was received.
"""

import os.path as osp
import re
from collections.abc import Iterator

from mmengine.config import Config
from mmengine.runner import Runner
from mmengine.utils import is_abs

from ..checkpoints import check_checkpoint, newest_checkpoint

INIT_CFG = re.compile(r'\.init_cfg(\[\d+\])?$')


def check_training_inputs(cfg: Config) -> None:
    """Checks the files that a training run reads: datasets, annotations and checkpoints.

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
        if cfg.get('resume'):
            _check_resume(cfg)
        else:
            check_checkpoint('load_from', cfg.load_from)


def _check_resume(cfg: Config) -> None:
    """Checks the checkpoint to resume from; the error names the newest one that is whole."""
    try:
        check_checkpoint('checkpoint to resume from', cfg.load_from, resume=True)
    except ValueError as error:
        folders = (osp.dirname(cfg.load_from), cfg.work_dir)
        newest = next(filter(None, map(newest_checkpoint, folders)), None)
        way_out = 'there is no whole one beside it: start without --resume'
        if newest is not None:
            way_out = f'continue from the newest whole one with --resume {newest}'
        raise ValueError(f'{error}; {way_out}') from error


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
    """Checks that the folders and annotation files of 'train', 'val' or 'test' exist.

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
    if not isinstance(path, str) or path == '' or backend != 'local':
        return False
    return '://' not in path and not path.startswith('s3:')


def check_not_empty(runner: Runner, split: str) -> None:
    """Builds the dataset of 'train', 'val' or 'test' and checks that it has images.

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
