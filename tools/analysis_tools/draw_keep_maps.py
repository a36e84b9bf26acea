"""Draws what the parts of a sparse model keep of images."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image
from torch import nn

from mmdynsparse.analysis.images import dataset_batches, file_batches, find_images
from mmdynsparse.analysis.models import load_weights
from mmdynsparse.utils.command_line.arguments import AnalysisParser, at_least, check_device
from mmdynsparse.utils.command_line.data_checks import check_data
from mmdynsparse.utils.command_line.errors import one_line_errors
from mmdynsparse.utils.command_line.launch import load_config
from mmdynsparse.visualization import check_drawable, keep_map_row


def build_parser() -> AnalysisParser:
    """Returns the parser of the command line."""
    parser = AnalysisParser(description=__doc__)
    parser.add_argument(
        '--images', nargs='+', help="files or folders; defaults to the config's test set"
    )
    parser.add_argument(
        '--num-images', type=at_least(1), default=4, help='at most, spread over all there are'
    )
    parser.add_argument(
        '--scale', type=float, default=1.0, help='size of the panels to that of the images'
    )
    return parser


def load_model(args: argparse.Namespace, cfg: Config) -> nn.Module:
    """Builds the model with its weights; what a dense checkpoint lacks stays random.

    Raises:
        ValueError: If nothing of the model can be drawn, or the device or the checkpoint cannot be
            used.
    """
    device = check_device(args.device)
    torch.manual_seed(args.seed)
    model = MODELS.build(cfg.model)
    check_drawable(model)
    if args.checkpoint:
        load_weights(model, args.checkpoint)
    return model.to(device).eval()


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tool.

    Args:
        argv: Command line arguments. Defaults to None, those of the process.
    """
    parser = build_parser()
    args = parser.parse(argv)
    with one_line_errors():
        if not 0 < args.scale <= 4:
            raise ValueError(f'--scale must be in (0, 4], got {args.scale}')
        cfg = load_config(args)
        init_default_scope(cfg.default_scope)
        model = load_model(args, cfg)
        if args.images:
            batches = file_batches(cfg, find_images(args.images), args.num_images)
        else:
            check_data(cfg, 'test')
            batches = dataset_batches(cfg, args.num_images)
        rows = []
        for batch in batches:
            with torch.no_grad():
                model.test_step(batch)
            rows.append(keep_map_row(model, batch, args.scale))
        path = Path(args.out or 'work_dirs') / 'keep_maps.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        width = max(row.shape[1] for row in rows)
        rows = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows]
        Image.fromarray(np.concatenate(rows)).save(path)
        print(path)


if __name__ == '__main__':
    main()
