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
from unittest.mock import patch
from zipfile import is_zipfile

import torch
from mmengine.runner import CheckpointLoader
from torch import serialization

# From trainings of mmengine (by numpy 1 and 2), and of timm, DeiT, ConvNeXt and DynamicViT.
LEFT_OUT = (
    'argparse.Namespace',
    'builtins.getattr',
    'mmengine.config.config.ConfigDict',
    'mmengine.logging.history_buffer.HistoryBuffer',
    'mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler',
    'numpy._core.multiarray._reconstruct',
    'numpy._core.multiarray.scalar',
    'numpy.core.multiarray._reconstruct',
    'numpy.core.multiarray.scalar',
    'numpy.dtype',
    'numpy.ndarray',
)
# Variables of torch: they overrule what the caller of torch.load asks for.
WEIGHTS_ONLY = dict(TORCH_FORCE_WEIGHTS_ONLY_LOAD='1', TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD='0')
# These are no downloads: mmengine reads them itself, with a list of its own.
STORES = re.compile(r'(\S+:)?(s3|petrel|pavi)://')


class LeftOut:
    """Stands in a checkpoint for an object that is not built."""

    def __init__(self, *args: object) -> None:
        """Take and forget the arguments of any object."""

    def __setstate__(self, state: object) -> None:
        """Forget the state."""


def _stand_in(path: str) -> type[LeftOut]:
    # torch finds what it may build by module and name.
    module, name = path.rsplit('.', 1)
    return type(name, (LeftOut,), {'__module__': module})


STAND_INS = [_stand_in(path) for path in LEFT_OUT]


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
        ValueError: If the file is missing or corrupt, holds more than weights and plain values, is
            no dict, or is to be resumed from and holds weights only.
    """
    if '://' in path:
        return {}
    if not osp.isfile(osp.expanduser(path)):
        raise ValueError(f'{argument} must be an existing checkpoint, got {path!r}')
    try:
        with _stand_ins():
            checkpoint = torch.load(osp.expanduser(path), map_location='cpu', weights_only=True)
    except Exception as error:
        _refuse_objects(argument, path, error)
        raise ValueError(
            f'{argument} must be a checkpoint that torch.load can read, got {path!r}, which is '
            f'corrupt or of another format ({type(error).__name__}: {_reason(error)})'
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
    """Read a checkpoint, from an address too, of which mmengine keeps a copy.

    Args:
        argument: Name of the argument for the message.
        path: As of :func:`check_checkpoint`.

    Raises:
        ValueError: As :func:`check_checkpoint`.
    """
    return check_checkpoint(argument, path) or _fetch(argument, path)


def _fetch(argument: str, address: str) -> dict:
    try:
        # mmengine asks torch.load for every object.
        with _stand_ins(address), patch.dict(os.environ, WEIGHTS_ONLY):
            return CheckpointLoader.load_checkpoint(address, map_location='cpu')
    except UnpicklingError as error:
        _refuse_objects(argument, address, error)
        raise


@contextmanager
def _stand_ins(address: str = '') -> Iterator[None]:
    """Let torch.load read what is left out; nothing changes for other readers, or afterwards."""
    before = serialization.get_safe_globals()
    if not STORES.match(address):
        serialization.add_safe_globals(STAND_INS)
    try:
        yield
    finally:
        serialization.clear_safe_globals()
        serialization.add_safe_globals(before)


def _refuse_objects(argument: str, path: str, error: Exception) -> None:
    """Raise a ValueError if the error is of a file with objects, and say how to convert it."""
    known = 'GLOBAL ' in str(error) or is_zipfile(osp.expanduser(path))  # of torch, not any file
    if not isinstance(error, UnpicklingError) or not known:
        return
    file = 'the downloaded file' if '://' in path else path
    raise ValueError(
        f'{argument} must hold weights and plain values, got {path!r} with more '
        f'({_reason(error)}), which may run any code when it is built. If you trust the file, '
        f'write its weights to another one: python -c "import torch; x = torch.load({file!r}, '
        "weights_only=False); torch.save({'state_dict': x.get('state_dict', x.get('model', x))}, "
        "'weights.pth')\""
    ) from error


def _reason(error: Exception) -> str:
    """Return what is wrong in one line, without torch's advice."""
    if refused := re.search(r'GLOBAL (\S+)', str(error)):
        return refused[1]
    return str(error).split('WeightsUnpickler error:')[-1].strip().split('\n')[0][:200]
