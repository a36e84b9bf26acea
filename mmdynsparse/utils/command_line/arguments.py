"""Arguments of the tools and what they accept."""

import argparse
import os
from collections.abc import Sequence
from typing import NoReturn

import torch
from mmengine.config import DictAction

DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
LAUNCHERS = ('none', 'pytorch', 'slurm', 'mpi')


class ToolParser(argparse.ArgumentParser):
    """Argument parser that reports a wrong command line in one line."""

    def add_run_arguments(self) -> None:
        """Adds the arguments that training and testing have in common."""
        self.add_argument('--work-dir', help='folder of logs, checkpoints and metrics')
        self.add_cfg_options()
        self.add_argument(
            '--launcher', choices=LAUNCHERS, default='none', help='how the processes are started'
        )
        # torch.distributed.launch of torch < 2.0 passes the first spelling, later ones the second.
        self.add_argument('--local_rank', '--local-rank', type=int, default=0)

    def add_cfg_options(self) -> None:
        """Adds the argument that overrides entries of the config."""
        self.add_argument(
            '--cfg-options',
            nargs='+',
            action=DictAction,
            metavar='KEY=VALUE',
            help='override entries of the config, e.g. model.backbone.sparsity.keep_ratio=0.5; '
            'lists are written key="[a,b]" or key=a,b, without white space',
        )

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parses arguments, by default those of the process; wrong ones exit with code 2."""
        try:
            return self.parse_args(argv)
        except ValueError as error:
            self.error(f'argument --cfg-options: expected KEY=VALUE pairs ({error})')

    def error(self, message: str) -> NoReturn:
        """Ends the process with one line instead of argparse's usage text."""
        self.exit(2, f'{self.prog}: error: {message}\n')


class AnalysisParser(ToolParser):
    """Parser with the arguments that every analysis tool has.

    Args:
        description: What the tool does.
        out: What it writes. Defaults to 'folder for the results'.
    """

    def __init__(self, description: str, out: str = 'folder for the results') -> None:
        super().__init__(description=description)
        self.add_argument('config', help='config file of the sparse model')
        self.add_argument(
            'checkpoint', nargs='?', help='checkpoint file; random weights without one'
        )
        self.add_cfg_options()
        self.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
        self.add_argument('--seed', type=int, default=0, help='of random weights and images')
        self.add_argument('--out', help=out)
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
    """Return the device 'cpu' or 'cuda', or raise a ValueError if there is no CUDA."""
    if name == 'cuda' and not torch.cuda.is_available():
        raise ValueError(
            "--device must be 'cpu' on a machine without CUDA, got 'cuda' "
            f'(torch {torch.__version__} finds no GPU)'
        )
    return torch.device(name)


def check_image(path: str | None, argument: str = '--image') -> None:
    """Raise a ValueError if the file of an image does not exist."""
    if path is not None and not os.path.isfile(path):
        raise ValueError(f'{argument} must be an existing file, got {path!r}')
