"""Exports a model: a segmentor whole, a detector up to its dense head."""

import argparse
import time
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmdynsparse import set_budget
from mmdynsparse.deployment.export import check_output, describe, export_model
from mmdynsparse.deployment.graph import build_graph
from mmdynsparse.deployment.runtime import Metadata, Session, fit
from mmdynsparse.utils.checkpoints import check_weights, read_checkpoint
from mmdynsparse.utils.command_line.arguments import ToolParser, at_least, check_image, image_size
from mmdynsparse.utils.command_line.errors import one_line_errors
from mmdynsparse.utils.command_line.launch import load_config


def build_parser() -> ToolParser:
    """Returns the parser of the command line."""
    parser = ToolParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out', required=True, help='file to write: FILE.onnx, or FILE.pt2 compiled by AOTInductor'
    )
    parser.add_argument(
        '--size',
        type=image_size,
        metavar='H or HxW',
        help="size of the images in px; defaults to the config's crop_size",
    )
    parser.add_argument(
        '--batch', type=batch_size, default=1, help="images of a call, or 'dynamic' for any number"
    )
    parser.add_argument('--budget', help='as of tools/test.py')
    parser.add_argument(
        '--argmax', action='store_true', help='classes of a segmentor in place of its logits'
    )
    parser.add_argument(
        '--verify', nargs='+', default=(), metavar='IMAGE', help='compare with torch on these'
    )
    parser.add_argument(
        '--int8',
        nargs='+',
        default=(),
        metavar='IMAGE',
        help='quantize to 8 bits for ONNX Runtime, with the ranges that these images give',
    )
    parser.add_argument(
        '--opset', type=at_least(18), default=20, help="version of ONNX's operators"
    )
    parser.add_cfg_options()
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0)
    return parser


def batch_size(text: str) -> int | None:
    """Parses a number of images, None for 'dynamic'."""
    return None if text == 'dynamic' else at_least(1)(text)


def load_model(args: argparse.Namespace, cfg: Config) -> tuple[nn.Module, dict | None]:
    """Returns the model with its weights and budget, in eval mode, and what data it is for.

    Raises:
        ValueError: If the checkpoint or the budget does not fit.
    """
    checkpoint = read_checkpoint('checkpoint', args.checkpoint)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    check_weights(model, checkpoint.get('state_dict', checkpoint), args.checkpoint)
    if args.budget:
        set_budget(model, args.budget)
    model.eval()  # mmseg's VisionTransformer does not return itself
    return model, checkpoint.get('meta', {}).get('dataset_meta')


def choose_size(args: argparse.Namespace, cfg: Config) -> tuple[int, int]:
    """Returns the size of the images.

    Raises:
        ValueError: If neither the command line nor the config names one.
    """
    size = args.size or cfg.get('crop_size')
    if not size:
        raise ValueError('--size must be given where the config has no crop_size, got none')
    return tuple(size)


def verify(graph: nn.Module, path: str, metadata: Metadata, images: Sequence[str]) -> None:
    """Prints how far the file's outputs are from torch's, for each image."""
    session = Session(path)
    for name in images:
        inputs, _ = fit(cv2.imread(name), metadata)
        with torch.no_grad():
            expected = [x.numpy() for x in graph(torch.from_numpy(inputs))]
        outputs = session(inputs)
        pairs = list(zip(outputs, expected, strict=True))
        difference = max(float(np.abs(a - b).max()) for a, b in pairs)
        print(f'{name}: largest difference from torch {difference:.1e}', end='')
        if metadata.outputs == ['logits']:
            same = np.mean(outputs[0].argmax(1) == expected[0].argmax(1))
            print(f', same class in {100 * same:.3f}% of the locations', end='')
        print()


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tool.

    Args:
        argv: Command line arguments. Defaults to None, those of the process.
    """
    args = build_parser().parse(argv)
    with one_line_errors():
        check_output(args.out)
        for option in ('verify', 'int8'):
            for image in getattr(args, option):
                check_image(image, f'--{option}')
        cfg = load_config(args)
        size = choose_size(args, cfg)
        model, meta = load_model(args, cfg)
        graph = build_graph(model, size, args.argmax)
        metadata, start = describe(graph, meta), time.time()
        images = [cv2.imread(name) for name in args.int8]
        export_model(graph, args.out, metadata, args.batch, args.opset, images)
        print(f'{args.out}: {len(graph.outputs)} outputs, images {size[0]}x{size[1]}, ', end='')
        print(f'batch {args.batch or "dynamic"}, exported in {time.time() - start:.0f} s')
        verify(graph, args.out, metadata, args.verify)


if __name__ == '__main__':
    main()
