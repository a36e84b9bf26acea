"""Draws what a model predicts on images and, beside it, what its sparse parts keep."""

import os.path as osp
from collections.abc import Mapping, Sequence
from pathlib import Path

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, VISUALIZERS, init_default_scope
from mmengine.visualization import Visualizer
from PIL import Image, UnidentifiedImageError
from torch import nn

from mmdynsparse import set_budget
from mmdynsparse.analysis.images import file_batches
from mmdynsparse.analysis.models import load_weights
from mmdynsparse.utils.checkpoints import read_checkpoint
from mmdynsparse.utils.command_line.arguments import ToolParser, check_device
from mmdynsparse.utils.command_line.errors import one_line_errors
from mmdynsparse.utils.command_line.launch import load_config
from mmdynsparse.visualization import check_drawable, keep_map_row, labelled_panel
from mmdynsparse.visualization.keep_maps import GAP


def build_parser() -> ToolParser:
    """Returns the parser of the command line."""
    parser = ToolParser(description=__doc__)
    parser.add_argument('images', nargs='+', help='files of images')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--budget', help="keep ratios to use, such as 'budgets.json:0.6'")
    parser.add_argument(
        '--keep-maps', action='store_true', help='draw what each sparse part keeps, too'
    )
    parser.add_argument('--out', default='work_dirs/demo', help='folder for the pictures')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_cfg_options()
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0)
    return parser


def output_paths(images: Sequence[str], folder: str) -> list[Path]:
    """Returns where the picture of each image goes.

    Raises:
        ValueError: If one is not an image, or its picture exists.
    """
    paths = [Path(folder) / f'{Path(image).stem}.png' for image in images]
    for image, path in zip(images, paths, strict=True):
        try:
            with Image.open(image) as file:
                file.verify()
        except (OSError, UnidentifiedImageError):
            raise ValueError(f'images must be files of images, got {image!r}') from None
        if path.exists() or paths.count(path) > 1:
            raise ValueError(
                f'--out must be a folder without the pictures of these images, got {folder!r}: '
                f'{path.name} is there, or would be written twice'
            )
    return paths


def load_model(args, cfg: Config) -> nn.Module:
    """Builds the model with its weights and budget.

    Raises:
        ValueError: If the checkpoint, the budget or the device cannot be used.
    """
    model = MODELS.build(cfg.model)
    load_weights(model, args.checkpoint)
    if args.budget:
        set_budget(model, args.budget)
    if args.keep_maps:
        check_drawable(model)
    return model.to(check_device(args.device)).eval()


def dataset_meta(cfg: Config, checkpoint: str) -> dict:
    """Returns class names and colours: of the checkpoint, the config's data set, or numbers."""
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    kind = DATASETS.get(dataset['type']) if 'type' in dataset else None
    own = (read_checkpoint('checkpoint', checkpoint).get('meta') or {}).get('dataset_meta') or {}
    meta = {**getattr(kind, 'METAINFO', {}), **(dataset.get('metainfo') or {}), **own}
    meta = {key.lower(): value for key, value in meta.items()}
    head = cfg.model.get('decode_head') or {}
    count = head.get('num_classes', 0) if isinstance(head, Mapping) else head[-1]['num_classes']
    classes = meta.get('classes') or [str(i) for i in range(count)]
    colours = np.random.default_rng(0).integers(0, 256, (len(classes), 3)).tolist()
    return dict(classes=classes, palette=meta.get('palette') or colours)


def draw(model: nn.Module, visualizer: Visualizer, image: str, batch: dict, maps: bool) -> Image:
    """Runs the model on an image and draws the prediction, with keep maps to its right."""
    with torch.no_grad():
        (sample,) = model.test_step(batch)
        row = keep_map_row(model, batch) if maps else None
    pixels = mmcv.imread(image, channel_order='rgb')
    visualizer.add_datasample('demo', pixels, sample.cpu(), draw_gt=False)
    prediction = Image.fromarray(visualizer.drawn)
    if row is None:
        return prediction
    height = row.shape[0] - labelled_panel(row[:0], '').shape[0]
    width = round(prediction.width * height / prediction.height)
    panel = labelled_panel(np.asarray(prediction.resize((width, height))), 'prediction')
    gap = np.full((row.shape[0], GAP, 3), 255, np.uint8)
    return Image.fromarray(np.concatenate([panel, gap, row], axis=1))


def build_visualizer(cfg: Config, checkpoint: str) -> Visualizer:
    """Builds the visualizer of the config's library, which keeps the last picture as ``drawn``."""
    kind = dict(mmseg='SegLocalVisualizer', mmdet='DetLocalVisualizer')[cfg.default_scope]
    visualizer = VISUALIZERS.build(dict(type=kind, name='demo'))
    visualizer.dataset_meta = dataset_meta(cfg, checkpoint)

    def keep(name: str, image: np.ndarray, step: int = 0) -> None:
        visualizer.drawn = image

    visualizer.add_image = keep
    return visualizer


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tool.

    Args:
        argv: Command line arguments. Defaults to None, those of the process.
    """
    args = build_parser().parse(argv)
    with one_line_errors():
        cfg = load_config(args)
        paths = output_paths(args.images, args.out)
        init_default_scope(cfg.default_scope)
        model = load_model(args, cfg)
        visualizer = build_visualizer(cfg, args.checkpoint)
        batches = file_batches(cfg, args.images, len(args.images))
        for image, path, batch in zip(args.images, paths, batches, strict=True):
            picture = draw(model, visualizer, osp.expanduser(image), batch, args.keep_maps)
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
            print(path)


if __name__ == '__main__':
    main()
