"""Images for measurements: noise, files, or those of a config's test set."""

import os
from collections.abc import Iterator, Sequence

import mmcv
import numpy as np
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DATASETS, TRANSFORMS
from torch.utils.data import Dataset

PACKERS = {'mmseg': 'mmseg.PackSegInputs', 'mmdet': 'mmdet.PackDetInputs'}
META_KEYS = ('img_path', 'ori_shape', 'img_shape', 'scale_factor')
SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')


def image_batch(
    batch: int, hw: tuple[int, int], scope: str, image: str | None = None, seed: int = 0
) -> dict:
    """Make a batch as a data loader of mmseg or mmdet gives it.

    Args:
        batch: Number of images.
        hw: Height and width of the images, in px.
        scope: 'mmseg' or 'mmdet'.
        image: File of an image, which is resized and repeated. Defaults to None, noise.
        seed: Of the noise. Defaults to 0.
    """
    if image is None:
        rng = np.random.default_rng(seed)
        pictures = [rng.integers(0, 256, (*hw, 3), np.uint8) for _ in range(batch)]
    else:
        pictures = [mmcv.imresize(mmcv.imread(image), hw[::-1])] * batch
    packer = TRANSFORMS.build(dict(type=PACKERS[scope], meta_keys=META_KEYS))
    meta = dict(img_path=image or '', ori_shape=hw, img_shape=hw, scale_factor=(1.0, 1.0))
    return pseudo_collate([packer.transform(dict(img=picture, **meta)) for picture in pictures])


def find_images(paths: Sequence[str]) -> list[str]:
    """Return files, and those of folders by name.

    Raises:
        ValueError: If a path does not exist, or there is no image.
    """
    files = []
    for path in paths:
        if not os.path.exists(path):
            raise ValueError(f'--images must be existing files or folders, got {path!r}')
        if os.path.isdir(path):
            names = sorted(n for n in os.listdir(path) if n.lower().endswith(SUFFIXES))
            files += [os.path.join(path, name) for name in names]
        else:
            files.append(path)
    if not files:
        raise ValueError(f'--images must hold images ({", ".join(SUFFIXES)}), got none in {paths}')
    return files


def file_batches(cfg: Config, files: Sequence[str], count: int) -> Iterator[dict]:
    """Load up to ``count`` files, spread evenly, by the config's test pipeline.

    Raises:
        ValueError: If the config has no test pipeline.
    """
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    if 'pipeline' not in dataset:
        raise ValueError('--images needs test_dataloader.dataset.pipeline in the config, got none')
    # There are no annotations of a plain image.
    pipeline = Compose([t for t in dataset['pipeline'] if 'LoadAnnotations' not in str(t['type'])])
    for i in _spread(len(files), count):
        yield pseudo_collate([pipeline(dict(img_path=files[i], img_id=i))])


def test_dataset(cfg: Config) -> Dataset:
    """Build the config's test set.

    Raises:
        ValueError: If there is none.
    """
    if not cfg.get('test_dataloader'):
        raise ValueError(
            'config must have a test_dataloader unless --images or --size is given, got none'
        )
    return DATASETS.build(cfg.test_dataloader['dataset'])


def dataset_batches(cfg: Config, count: int) -> Iterator[dict]:
    """Load up to ``count`` images of the config's test set, spread evenly.

    Raises:
        ValueError: If there is no test set, or it is empty.
    """
    dataset = test_dataset(cfg)
    if len(dataset) == 0:
        raise ValueError('test_dataloader.dataset must hold at least 1 image, got 0')
    for i in _spread(len(dataset), count):
        yield pseudo_collate([dataset[i]])


def _spread(total: int, count: int) -> list[int]:
    """Indices of ``count`` of ``total`` things, or of all of them if there are fewer."""
    return np.linspace(0, total - 1, min(count, total), dtype=int).tolist()
