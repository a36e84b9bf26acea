"""A small generated dataset of landscapes with objects, for segmentation and detection.

Every scene has a plain background (sky, grass, a road, a lake) and small objects of five classes,
whose size follows the distance to the horizon: most of an image is easy, and little of it counts.
Semantic maps and COCO instances come from the same painted instance map and therefore agree with
each other pixel by pixel.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

STUFF_CLASSES = ('sky', 'grass', 'road', 'water')
THING_CLASSES = ('house', 'tree', 'car', 'person', 'bird')
CLASSES = STUFF_CLASSES + THING_CLASSES
PALETTE = (
    (120, 180, 230),
    (110, 170, 60),
    (128, 128, 128),
    (30, 90, 200),
    (200, 60, 40),
    (20, 100, 30),
    (240, 200, 0),
    (255, 0, 200),
    (60, 20, 80),
)
IGNORE_INDEX = 255
MIN_SIDE = 64
MIN_VISIBLE_AREA = 6  # px
_MARKER = 'scenes.json'
_FORMAT = 2  # raise it when the drawing changes: older folders are then written anew


class _Scene(NamedTuple):
    """A painted scene."""

    image: np.ndarray  # (H, W, 3) uint8 RGB
    semantic: np.ndarray  # (H, W) uint8 class ids, 255 = ignore
    instances: np.ndarray  # (H, W) int32, 0 = no object
    categories: list[int]  # class id of instance 1, 2, ...


def write_scenes(
    root: str | Path,
    num_train: int,
    num_val: int,
    size: tuple[int, int] = (512, 512),
    seed: int = 0,
) -> Path:
    """Write the dataset, or reuse a complete one made with the same arguments.

    Layout: ``images/{train,val}/*.jpg``, ``annotations/{train,val}/*.png`` (uint8 class ids,
    255 = ignore) and ``annotations/instances_{train,val}.json`` (COCO, visible parts as RLE). The
    folder appears under its name only when it is complete.

    Args:
        root: Folder of the dataset.
        num_train: Number of training scenes, at least 1.
        num_val: Number of validation scenes, at least 1.
        size: (H, W) of the images in px, each at least 64. Defaults to (512, 512).
        seed: Seed of all random choices, at least 0. Defaults to 0.

    Returns:
        ``root`` as a path.

    Raises:
        ValueError: An argument is out of its range.
        FileExistsError: ``root`` holds files that this function did not write.
    """
    _check_arguments(num_train, num_val, size, seed)
    root = Path(root)
    marker = dict(format=_FORMAT, num_train=num_train, num_val=num_val, size=list(size), seed=seed)
    if _is_complete(root, marker):
        return root
    if root.exists() and any(root.iterdir()) and not (root / _MARKER).exists():
        raise FileExistsError(f'{root} holds other files; move them or choose another folder')
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f'.{root.name}-') as scratch:
        new = Path(scratch) / 'new'
        _write_split(new, 'train', num_train, size, [seed, 0])
        _write_split(new, 'val', num_val, size, [seed, 1])
        (new / _MARKER).write_text(json.dumps(marker))
        if root.exists():
            os.replace(root, Path(scratch) / 'old')
        os.replace(new, root)
    return root


def _check_arguments(num_train: int, num_val: int, size: tuple[int, int], seed: int) -> None:
    for name, value in (('num_train', num_train), ('num_val', num_val)):
        if value < 1:
            raise ValueError(f'{name} must be at least 1, got {value}')
    if len(size) != 2 or min(size) < MIN_SIDE:
        raise ValueError(f'size must be (H, W) with both at least {MIN_SIDE}, got {size}')
    if seed < 0:
        raise ValueError(f'seed must be at least 0, got {seed}')


def _is_complete(root: Path, marker: dict) -> bool:
    """Whether ``root`` was written with these arguments and none of its files were removed."""
    path = root / _MARKER
    if not path.exists() or json.loads(path.read_text()) != marker:
        return False
    return all(
        (root / 'annotations' / f'instances_{split}.json').exists()
        and len(list((root / 'images' / split).glob('*.jpg'))) == marker[f'num_{split}']
        and len(list((root / 'annotations' / split).glob('*.png'))) == marker[f'num_{split}']
        for split in ('train', 'val')
    )


def _write_split(root: Path, split: str, number: int, size: tuple[int, int], seed: list) -> None:
    for kind in ('images', 'annotations'):
        (root / kind / split).mkdir(parents=True)
    images, annotations = [], []
    for i in range(number):
        scene = _paint_scene(np.random.default_rng([*seed, i]), size)
        name = f'{i:04d}'
        Image.fromarray(scene.image).save(root / 'images' / split / f'{name}.jpg', quality=85)
        Image.fromarray(scene.semantic).save(root / 'annotations' / split / f'{name}.png')
        images.append(dict(id=i + 1, file_name=f'{name}.jpg', height=size[0], width=size[1]))
        annotations += _coco_annotations(scene, i + 1, len(annotations) + 1)
    categories = [dict(id=k, name=name) for k, name in enumerate(THING_CLASSES, 1)]
    coco = dict(images=images, annotations=annotations, categories=categories)
    (root / 'annotations' / f'instances_{split}.json').write_text(json.dumps(coco))


def _coco_annotations(scene: _Scene, image_id: int, first_id: int) -> list[dict]:
    annotations = []
    for instance, category in enumerate(scene.categories, 1):
        mask = (scene.instances == instance).astype(np.uint8, order='F')
        if not mask.any():
            continue
        rle = coco_mask.encode(mask)
        annotations.append(
            dict(
                id=first_id + len(annotations),
                image_id=image_id,
                category_id=category - len(STUFF_CLASSES) + 1,
                iscrowd=0,
                area=int(coco_mask.area(rle)),
                bbox=[int(v) for v in coco_mask.toBbox(rle)],
                segmentation=dict(size=rle['size'], counts=rle['counts'].decode('ascii')),
            )
        )
    return annotations


def _paint_scene(rng: np.random.Generator, size: tuple[int, int]) -> _Scene:
    horizon = int(size[0] * rng.uniform(0.28, 0.48))
    semantic = _background_map(rng, size, horizon)
    image = _background_image(rng, semantic, horizon)
    instances = np.zeros(size, np.int32)
    categories = []
    for name, x, y, height in _place_objects(rng, semantic, horizon):
        parts = Image.new('L', (size[1], size[0]))
        colours = _SHAPES[name](ImageDraw.Draw(parts), x, y, height, rng)
        parts = np.asarray(parts)
        painted = parts > 0
        image[painted] = np.asarray(colours, np.float32)[parts[painted] - 1]
        categories.append(CLASSES.index(name))
        instances[painted] = len(categories)

    for instance, category in enumerate(categories, 1):
        visible = instances == instance
        sliver = visible.sum() < MIN_VISIBLE_AREA
        semantic[visible] = IGNORE_INDEX if sliver else category
        instances[visible] = 0 if sliver else instance
    return _Scene(_light(rng, image), semantic, instances, categories)


def _noise(rng: np.random.Generator, size: tuple[int, int], cell: tuple[int, int]) -> np.ndarray:
    """Smooth noise (H, W) with standard deviation about 1 and features of ``cell`` px (h, w)."""
    grid = [max(2, -(-s // c)) for s, c in zip(size, cell, strict=True)]
    coarse = Image.fromarray(rng.standard_normal(grid, dtype=np.float32))
    return np.asarray(coarse.resize((size[1], size[0]), Image.Resampling.BICUBIC))


def _background_map(rng: np.random.Generator, size: tuple[int, int], horizon: int) -> np.ndarray:
    height, width = size
    y, x = np.mgrid[:height, :width].astype(np.float32)
    near = (y - horizon) / (height - horizon)
    semantic = np.full(size, CLASSES.index('grass'), np.uint8)

    bend = 0.06 * width * _noise(rng, (height, 1), (max(2, height // 4), 1))
    if rng.random() < 0.7:
        cx, cy = rng.uniform(0, width), horizon + rng.uniform(0.1, 0.7) * (height - horizon)
        rx, ry = width * rng.uniform(0.2, 0.45), (height - horizon) * rng.uniform(0.15, 0.4)
        lake = ((x - cx + bend) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1
        semantic[lake] = CLASSES.index('water')
    if rng.random() < 0.8:
        top, bottom = rng.uniform(0.2, 0.8, 2) * width
        centre = top + (bottom - top) * near + bend * near
        half = width * (0.015 + rng.uniform(0.10, 0.2) * near)
        semantic[abs(x - centre) < half] = CLASSES.index('road')
    semantic[:horizon] = CLASSES.index('sky')
    return semantic


def _background_image(rng: np.random.Generator, semantic: np.ndarray, horizon: int) -> np.ndarray:
    """Colour and texture of the background, (H, W, 3) float32 in [0, 255]."""
    size = semantic.shape
    blue = rng.uniform((60, 110, 150), (150, 180, 230))
    depth = np.linspace(0, 1, size[0], dtype=np.float32)[:, None]
    textures = dict(
        sky=(blue * 1.1, 5 * _noise(rng, size, (60, 120)) + 60 * depth),
        grass=(
            rng.uniform((60, 110, 30), (140, 170, 80)),
            4 * _noise(rng, size, (6, 3)) + 5 * _noise(rng, size, (60, 60)),
        ),
        road=(
            np.full(3, rng.uniform(80, 150)) + rng.uniform(-8, 8, 3),
            3 * _noise(rng, size, (2, 2)) + 4 * _noise(rng, size, (60, 24)),
        ),
        water=(
            blue * rng.uniform(0.55, 0.85),
            4 * _noise(rng, size, (4, 28)) + 4 * np.sin(depth * rng.uniform(60, 160)),
        ),
    )
    image = np.zeros((*size, 3), np.float32)
    for name, (colour, texture) in textures.items():
        region = semantic == CLASSES.index(name)
        image[region] = (colour + texture[..., None])[region]
    haze = np.exp(-abs(np.arange(size[0]) - horizon) / (0.1 * size[0]))[:, None, None]
    return image + 0.35 * haze * (205 - image)


def _place_objects(
    rng: np.random.Generator, semantic: np.ndarray, horizon: int
) -> list[tuple[str, float, float, float]]:
    """Names, base points (x, y) and heights in px of the objects, from far to near."""
    height, width = semantic.shape
    rules = dict(  # most objects, allowed ground, height far and near as a share of H
        house=(2, ('grass',), 0.05, 0.16),
        tree=(4, ('grass',), 0.05, 0.18),
        car=(4, ('road', 'grass'), 0.03, 0.08),
        person=(6, ('grass', 'road'), 0.04, 0.10),
    )
    placed = []
    for name, (most, ground, far, near) in rules.items():
        for _ in range(rng.integers(1, most + 1)):
            x, y = rng.integers(0, width), rng.integers(horizon + 2, height)
            if CLASSES[semantic[y, x]] in ground:
                share = far + (near - far) * (y - horizon) / (height - horizon)
                placed.append((name, x, y, height * share * rng.uniform(0.8, 1.2)))
    placed.sort(key=lambda item: item[2])
    for _ in range(rng.integers(1, 6)):
        x, y = rng.uniform(0, width), rng.uniform(0.05, 1.2) * horizon
        placed.append(('bird', x, y, height * rng.uniform(0.02, 0.05)))
    return placed


def _house(draw: ImageDraw.ImageDraw, x: float, y: float, h: float, rng) -> list:
    w = h * rng.uniform(0.4, 0.7)
    eaves = y - 0.6 * h
    draw.rectangle((x - w, eaves, x + w, y), fill=1)
    draw.polygon([(x - 1.15 * w, eaves), (x + 1.15 * w, eaves), (x, y - h)], fill=2)
    for side in (-0.6, 0.3):
        draw.rectangle((x + side * w, y - 0.45 * h, x + (side + 0.3) * w, y - 0.2 * h), fill=3)
    wall = rng.uniform((150, 110, 90), (240, 225, 210))
    return [wall, rng.uniform((110, 30, 20), (190, 80, 60)), wall * 0.3]


def _tree(draw: ImageDraw.ImageDraw, x: float, y: float, h: float, rng) -> list:
    w = h * rng.uniform(0.22, 0.4)
    draw.rectangle((x - 0.06 * h, y - 0.4 * h, x + 0.06 * h, y), fill=1)
    draw.ellipse((x - w, y - h, x + w, y - 0.25 * h), fill=2)
    for _ in range(5):
        cx, cy = x + w * rng.uniform(-0.6, 0.6), y - h * rng.uniform(0.4, 0.85)
        draw.ellipse((cx - 0.3 * w, cy - 0.3 * w, cx + 0.3 * w, cy + 0.3 * w), fill=3)
    leaves = rng.uniform((15, 60, 15), (60, 105, 45))
    return [(85, 60, 40), leaves, leaves * 1.3]


def _car(draw: ImageDraw.ImageDraw, x: float, y: float, h: float, rng) -> list:
    w = h * rng.uniform(0.9, 1.2)
    draw.rectangle((x - w, y - 0.6 * h, x + w, y - 0.15 * h), fill=1)
    roof = [(-0.65, -0.6), (-0.4, -1), (0.35, -1), (0.6, -0.6)]
    draw.polygon([(x + a * w, y + b * h) for a, b in roof], fill=2)
    for side in (-0.55, 0.55):
        cx, r = x + side * w, 0.2 * h
        draw.ellipse((cx - r, y - 2 * r, cx + r, y), fill=3)
    paints = [(200, 30, 30), (235, 235, 235), (30, 50, 160), (240, 180, 20), (40, 40, 45)]
    return [np.add(paints[rng.integers(5)], rng.uniform(-15, 15, 3)), (70, 95, 110), (20, 20, 20)]


def _person(draw: ImageDraw.ImageDraw, x: float, y: float, h: float, rng) -> list:
    w = max(1.6, 0.15 * h)
    for side in (-0.6, 0.6):
        draw.rectangle((x + (side - 0.35) * w, y - 0.5 * h, x + (side + 0.35) * w, y), fill=1)
    draw.rectangle((x - w, y - 0.82 * h, x + w, y - 0.42 * h), fill=2)
    draw.ellipse((x - 0.6 * w, y - h, x + 0.6 * w, y - 0.8 * h), fill=3)
    return [
        rng.uniform((20, 20, 50), (80, 80, 120)),
        rng.uniform((180, 20, 60), (255, 140, 255)),
        rng.uniform((150, 100, 70), (235, 190, 160)),
    ]


def _bird(draw: ImageDraw.ImageDraw, x: float, y: float, h: float, rng) -> list:
    lift = rng.uniform(0.2, 0.5) * h
    for side in (-1, 1):
        draw.line((x, y, x + side * 0.6 * h, y - lift), fill=1, width=2)
    draw.ellipse((x - 0.25 * h, y - 0.2 * h, x + 0.25 * h, y + 0.2 * h), fill=1)
    return [rng.uniform(10, 60, 3)]


_SHAPES = dict(house=_house, tree=_tree, car=_car, person=_person, bird=_bird)


def _light(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Apply exposure, a slow shading and sensor noise; return uint8."""
    size = image.shape[:2]
    shading = 1 + 0.05 * _noise(rng, size, (size[0] // 2, size[1] // 2))
    image = image * rng.uniform(0.75, 1.2) * shading[..., None]
    image = image + rng.normal(0, 4, image.shape) + 4 * _noise(rng, size, (3, 3))[..., None]
    return image.clip(0, 255).astype(np.uint8)
