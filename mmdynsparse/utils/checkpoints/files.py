"""Reading the files of checkpoints, without running what is in them.

Only tensors and plain values are built (``torch.load`` with ``weights_only=True``). What the
checkpoints of trainings hold beside them, logs and numbers of numpy, is left out.
"""

import os
import os.path as osp
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from zipfile import is_zipfile

import torch
from mmengine.runner import CheckpointLoader
from torch import serialization

# From trainings of mmengine (by numpy 1 and 2), and of timm, DeiT, ConvNeXt and DynamicViT.
LEFT_OUT = (
    ('argparse', 'Namespace'),
    ('builtins', 'getattr'),
    ('mmengine.config.config', 'ConfigDict'),
    ('mmengine.logging.history_buffer', 'HistoryBuffer'),
    ('mmengine.optim.scheduler.param_scheduler', 'OneCycleParamScheduler'),
    ('numpy', 'dtype'),
    ('numpy', 'ndarray'),
    ('numpy._core.multiarray', '_reconstruct'),
    ('numpy._core.multiarray', 'scalar'),
    ('numpy.core.multiarray', '_reconstruct'),
    ('numpy.core.multiarray', 'scalar'),
)
# Variables of torch: they overrule what the caller of torch.load asks for.
WEIGHTS_ONLY = dict(TORCH_FORCE_WEIGHTS_ONLY_LOAD='1', TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD='0')
# mmengine reads these itself, with a list of its own.
STORES = re.compile(r'(\S+:)?(s3|petrel|pavi)://')


class LeftOut:
    """Stands in a checkpoint for an object that is not built: it forgets arguments and state."""

    def __init__(self, *args: object) -> None:
        pass

    __setstate__ = __init__


# torch finds what it may build by module and name.
STAND_INS = [type(name, (LeftOut,), {'__module__': module}) for module, name in LEFT_OUT]


def check_checkpoint(argument: str, path: str, resume: bool = False) -> dict:
    """Return what the file of a checkpoint holds, but an empty dict for an address.

    Args:
        argument: Name of the argument for the message.
        path: Path of the file, or an address with a scheme such as ``https://``.
        resume: Whether training is to continue from it. Defaults to False.

    Raises:
        ValueError: If the file is missing or corrupt, holds more than weights and plain values, is
            no dict, or is to be resumed from and holds weights only.
    """
    if '://' in path:
        return {}
    checkpoint = read_checkpoint(argument, path)
    if resume and not {'meta', 'message_hub'} <= checkpoint.keys():
        raise ValueError(
            f'{argument} must be a checkpoint of a training run (with meta and message_hub) to '
            f'resume from, got only weights in {path!r}; load them with load_from'
        )
    return checkpoint


def read_checkpoint(argument: str, path: str) -> dict:
    """Read a checkpoint, from an address too, of which mmengine keeps a copy.

    Arguments and errors are those of :func:`check_checkpoint`.
    """
    if '://' not in path and not osp.isfile(osp.expanduser(path)):
        raise ValueError(f'{argument} must be an existing checkpoint, got {path!r}')
    try:
        checkpoint = _load(path)
    except Exception as error:
        raise ValueError(f'{argument} must {_fault(path, error)}') from error
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f'{argument} must hold a dict of weights, got a {type(checkpoint).__name__} in {path!r}'
        )
    return checkpoint


def _load(path: str) -> object:
    if '://' not in path:
        with _may_build(STAND_INS):
            return torch.load(osp.expanduser(path), map_location='cpu', weights_only=True)
    classes = [] if STORES.match(path) else STAND_INS
    # mmengine asks torch.load for every object.
    with _may_build(classes), _environment(WEIGHTS_ONLY):
        return CheckpointLoader.load_checkpoint(path, map_location='cpu')


@contextmanager
def _may_build(classes: list[type]) -> Iterator[None]:
    """Let torch.load build classes beside tensors and plain values; afterwards all is as before."""
    before = serialization.get_safe_globals()
    serialization.add_safe_globals(classes)
    try:
        yield
    finally:
        serialization.clear_safe_globals()
        serialization.add_safe_globals(before)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables; afterwards all is as before."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _fault(path: str, error: Exception) -> str:
    """Say what a file must be, and what it is: one with other objects can be converted."""
    refused = re.search(r'GLOBAL (\S+)', str(error))
    reason = str(error).split('WeightsUnpickler error:')[-1].strip().split('\n')[0][:200]
    written_by_torch = refused or is_zipfile(osp.expanduser(path))
    if not isinstance(error, UnpicklingError) or not written_by_torch:
        return (
            f'be a checkpoint that torch.load can read, got {path!r}, which is missing, corrupt or '
            f'of another format ({type(error).__name__}: {reason})'
        )
    file = 'the downloaded file' if '://' in path else path
    return (
        f'hold weights and plain values, got {path!r} with more '
        f'({refused[1] if refused else reason}), which may run any code when it is built. If you '
        'trust the file, write its weights to another one: '
        f'python -c "import torch; x = torch.load({file!r}, weights_only=False); '
        "torch.save({'state_dict': x.get('state_dict', x.get('model', x))}, 'weights.pth')\""
    )
