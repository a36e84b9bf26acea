"""Converts a checkpoint of another code base to the names of our backbones."""

from collections.abc import Sequence
from pathlib import Path

import torch

from mmdynsparse.utils.checkpoints import SOURCES, convert_checkpoint, read_checkpoint
from mmdynsparse.utils.command_line.arguments import ToolParser
from mmdynsparse.utils.command_line.errors import one_line_errors


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tool.

    Args:
        argv: Command line arguments. Defaults to None, those of the process.
    """
    parser = ToolParser(description='Convert a checkpoint to the names of our backbones')
    parser.add_argument('src', help='checkpoint to read')
    parser.add_argument('dst', help='checkpoint to write')
    parser.add_argument('--source', choices=SOURCES, required=True, help='code base of SRC')
    args = parser.parse(argv)
    with one_line_errors():
        converted = convert_checkpoint(read_checkpoint('src', args.src), args.source)
    Path(args.dst).parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state_dict=converted), args.dst)
    print(f'{len(converted)} tensors written to {args.dst}')


if __name__ == '__main__':
    main()
