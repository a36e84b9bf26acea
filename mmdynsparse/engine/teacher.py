"""Teachers: models that are never trained, built from a config or copied from the student."""

import os.path as osp
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from copy import deepcopy

import torch
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ..models.decider import set_keep_ratio
from ..utils.checkpoints import check_checkpoint, check_weights, is_new, read_checkpoint
from .runs import bare_model, warn

COPY_NAME = 'distillation_teacher.pth'


def load_teacher(config: str | Mapping, checkpoint: str) -> tuple[nn.Module, Sequence[str] | None]:
    """Build the model of a config with the weights of a checkpoint.

    Args:
        config: Path of a config file, or a config.
        checkpoint: Path or address.

    Returns:
        The model, which keeps every location, and the classes that the checkpoint names, or None.

    Raises:
        ValueError: If a file is missing or unreadable, or the weights do not fit the model.
    """
    if isinstance(config, str) and not osp.isfile(config):
        raise ValueError(f'teacher.config must be an existing file, got {config!r}')
    cfg = Config.fromfile(config) if isinstance(config, str) else Config(dict(config))
    model_cfg = deepcopy(cfg.model)
    if cfg.get('default_scope'):
        model_cfg.setdefault('_scope_', cfg.default_scope)
    loaded = read_checkpoint('teacher.checkpoint', checkpoint)
    # The student starts from the same random weights with and without a teacher.
    with torch.random.fork_rng(devices=[]):
        model = MODELS.build(model_cfg)
    set_keep_ratio(model, 1.0)
    check_weights(model, loaded.get('state_dict', loaded), checkpoint)
    meta = loaded.get('meta', {})
    meta = meta | (meta.get('dataset_meta') or {})
    return model, meta.get('classes', meta.get('CLASSES'))  # the latter of older versions


def copy_student(
    runner: Runner, names: Sequence[str], loaded: Mapping[str, torch.Size | None] | None
) -> nn.Module:
    """Return a dense copy of the model as it was when its training began.

    The weights are written to ``distillation_teacher.pth`` in the work dir, from where a resumed
    training reads them.

    Args:
        runner: The runner of the training.
        names: Names of the modules whose outputs are compared.
        loaded: Shapes of the tensors in the checkpoint from which the training starts, None
            without a checkpoint.

    Raises:
        ValueError: If the model is sharded, the checkpoint lacks weights of those modules, or a
            training is resumed without that file.
    """
    if isinstance(runner.model, FullyShardedDataParallel):
        raise ValueError("teacher 'self' cannot be copied from a sharded model: name a checkpoint")
    student = bare_model(runner)
    # Hooks of others may refer to anything, the runner too.
    hooks = (h for m in student.modules() for h in (m._forward_hooks, m._forward_pre_hooks))
    teacher = deepcopy(student, {id(h): OrderedDict() for h in hooks})
    for module in teacher.modules():
        vars(module).pop('forward', None)  # bound to the student, by mmengine's checkpointing
    set_keep_ratio(teacher, 1.0)
    path = osp.join(runner.work_dir, COPY_NAME)
    if runner.iter > 0:
        if not osp.isfile(path):
            raise ValueError(
                f"a training with teacher 'self' is resumed with the file {COPY_NAME} of its first "
                f'start in the work dir, got none in {runner.work_dir!r}'
            )
        check_weights(teacher, check_checkpoint(COPY_NAME, path), path)
        return teacher
    if loaded is not None:
        _check_loaded(student, names, loaded)
    else:
        warn(
            "teacher 'self' is a copy of the model at the start, for which no checkpoint was "
            'loaded (load_from): what no init_cfg loads teaches what random weights say.'
        )
    if is_main_process():
        torch.save(teacher.state_dict(), path)
    return teacher


def check_teacher(
    student: nn.Module, teacher: nn.Module, heads: Sequence[str], classes: Sequence[Sequence | None]
) -> None:
    """Check that a teacher sees and names what the student does; another crop is warned of.

    Args:
        student: The student.
        teacher: The teacher.
        heads: Names of the heads whose logits are compared.
        classes: Names of the classes of student and teacher, None where they are not known.

    Raises:
        ValueError: If normalization, number or names of classes differ.
    """
    ours, theirs = (_preprocessing(model) for model in (student, teacher))
    if ours[:3] != theirs[:3]:
        raise ValueError(
            'teacher must have mean, std and channel order of the data_preprocessor as the '
            f'student, {ours[:3]}, got {theirs[:3]}'
        )
    if ours[3] != theirs[3]:
        warn(
            f"The teacher's data_preprocessor has the crop {theirs[3]}, the student's {ours[3]}: "
            'the teacher is used at a size that it was not trained for.'
        )
    for head in heads:
        heads_of_both = (model.get_submodule(head) for model in (student, teacher))
        ours, theirs = (getattr(module, 'num_classes', None) for module in heads_of_both)
        if ours != theirs:
            raise ValueError(
                f'teacher must have the {ours} classes of the student in {head}, got {theirs}'
            )
    if None not in classes and tuple(classes[0]) != tuple(classes[1]):
        raise ValueError(
            f'teacher must have been trained for the classes {tuple(classes[0])}, '
            f'got {tuple(classes[1])}'
        )


def _check_loaded(
    student: nn.Module, names: Sequence[str], loaded: Mapping[str, torch.Size | None]
) -> None:
    """Check that what a copy of the student teaches was in the checkpoint."""
    for name in names:
        if name.split('.')[0] == 'backbone':  # SparsityHook has looked at it
            continue
        state = student.get_submodule(name).state_dict(prefix=f'{name}.')
        state = {k: v for k, v in state.items() if not k.endswith('num_batches_tracked')}
        unfit = [k for k, v in state.items() if not is_new(k) and loaded.get(k) != v.shape]
        if unfit:
            raise ValueError(
                f"teacher 'self' needs all weights of {name} in the checkpoint (load_from), got "
                f'{len(unfit)} of {len(state)} missing or of another shape, such as {unfit[0]}: '
                'name a trained teacher, dict(config=..., checkpoint=...), or do not compare '
                f'{name} (logit_weight=0, or features without it)'
            )


def _preprocessing(model: nn.Module) -> tuple:
    """Mean, std, change of the channels' order, and crop."""
    module = model.data_preprocessor
    names = ('mean', 'std', '_channel_conversion', 'size')
    mean, std, swaps, size = (getattr(module, name, None) for name in names)
    mean, std = (v.flatten().tolist() if isinstance(v, Tensor) else v for v in (mean, std))
    return mean, std, swaps, tuple(size) if size else size
