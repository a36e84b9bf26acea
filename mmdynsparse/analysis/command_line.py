"""What the analysis tools share: arguments, and the models that they name."""

import argparse
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from ..utils.input_checks import check_weights, read_checkpoint
from ..utils.launch import ToolParser, load_config
from .dense import Pair, build_pair, share_weights
from .model_parts import patch_size, to_device

DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}


class AnalysisParser(ToolParser):
    """Parser with the arguments that every analysis tool has.

    Args:
        description: What the tool does, for ``--help``.
    """

    def __init__(self, description: str) -> None:
        super().__init__(description)
        self.add_argument('config', help='config file of the sparse model')
        self.add_argument(
            'checkpoint', nargs='?', help='checkpoint file; random weights without one'
        )
        self.add_cfg_options()
        self.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
        self.add_argument('--seed', type=int, default=0, help='of random weights and images')
        self.add_argument('--out', help='folder for the results')
        # What load_config expects of the tools that train and test.
        self.set_defaults(work_dir=None, launcher='none', local_rank=0)


def at_least(minimum: int):
    """Return the ``type`` of an argument that is an integer from ``minimum`` on."""

    def parse(text: str) -> int:
        if not text.lstrip('-').isdigit() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f'must be at least {minimum}, got {text!r}')
        return int(text)

    return parse


def image_size(text: str) -> tuple[int, int]:
    """Parse ``H`` or ``HxW``, in px."""
    sides = text.lower().split('x')
    if len(sides) > 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f'must be H or HxW in px, at least 1, got {text!r}')
    return int(sides[0]), int(sides[-1])


def keep_ratio(text: str) -> float | list[float]:
    """Parse a number, or numbers with commas for the predictors of one model."""
    try:
        ratios = [float(part) for part in text.split(',')]
    except ValueError:
        raise argparse.ArgumentTypeError(f'must be in (0, 1], got {text!r}') from None
    return ratios if ',' in text else ratios[0]


def check_device(name: str) -> torch.device:
    """Return the device 'cpu' or 'cuda'.

    Raises:
        ValueError: If it is 'cuda' and there is none.
    """
    if name == 'cuda' and not torch.cuda.is_available():
        raise ValueError(
            "--device must be 'cpu' on a machine without CUDA, got 'cuda' "
            f'(torch {torch.__version__} finds no GPU)'
        )
    return torch.device(name)


def load_models(args: argparse.Namespace, dtype: torch.dtype) -> tuple[Config, Pair]:
    """Build the model of the config and its dense original, with the weights that were asked for.

    Args:
        args: Arguments of an ``AnalysisParser``.
        dtype: Of weights and features.

    Returns:
        The config, and both models on the device.

    Raises:
        ValueError: If the config, the device or the checkpoint cannot be used.
    """
    cfg = load_config(args)
    device = check_device(args.device)
    init_default_scope(cfg.default_scope)
    torch.manual_seed(args.seed)
    pair = build_pair(cfg.model)
    if args.checkpoint:
        checkpoint = read_checkpoint('checkpoint', args.checkpoint)
        check_weights(pair.sparse, checkpoint.get('state_dict', checkpoint), args.checkpoint)
        share_weights(pair.sparse, pair.dense)
    for model in (pair.sparse, pair.dense):
        to_device(model, device, dtype)
    return cfg, pair


@contextmanager
def keep_partial(result: dict, count: Callable[[], str]) -> Iterator[None]:
    """Turn what stops a measurement into an error that says how much was measured before.

    Args:
        result: Gets the traceback under 'error'.
        count: Says how much there is.

    Raises:
        ValueError: If anything fails or the user interrupts.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        result['error'] = traceback.format_exc()
        reason = type(error).__name__ + (f': {error}' if str(error) else '')
        reason = ' '.join(reason.split())[:300]
        raise ValueError(f'stopped by {reason}; measured before: {count()}') from error


def check_sizes(sizes: Sequence[tuple[int, int]], pair: Pair) -> None:
    """Check that images are not smaller than a patch of the backbone.

    Raises:
        ValueError: If one is.
    """
    patch = patch_size(pair.sparse.backbone)
    for height, width in sizes:
        if min(height, width) < patch:
            raise ValueError(
                f'sizes must be at least one patch of the backbone, {patch} px, '
                f'got {height}x{width}'
            )


def check_image(path: str | None) -> None:
    """Check that the file of an image exists.

    Raises:
        ValueError: If it does not.
    """
    if path is not None and not os.path.isfile(path):
        raise ValueError(f'--image must be an existing file, got {path!r}')
