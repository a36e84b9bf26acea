"""Reading the files of checkpoints."""

import os.path as osp

from mmengine.runner import CheckpointLoader


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
