import hashlib
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from mmdynsparse.datasets import CLASSES, PALETTE, THING_CLASSES, write_scenes
from mmdynsparse.datasets import scenes as scenes_module

SIZE = (96, 128)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp('data') / 'scenes', 6, 2, size=SIZE)


def digests(root):
    files = sorted(path for path in root.rglob('*') if path.is_file())
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def load_coco(root, split):
    return json.loads((root / 'annotations' / f'instances_{split}.json').read_text())


def test_same_arguments_give_the_same_bytes(root, tmp_path):
    assert digests(write_scenes(tmp_path / 'again', 6, 2, size=SIZE)) == digests(root)


def test_seed_and_split_change_the_scenes(root, tmp_path):
    other = digests(write_scenes(tmp_path / 'other', 6, 2, size=SIZE, seed=1))
    mine = digests(root)
    assert other['images/train/0000.jpg'] != mine['images/train/0000.jpg']
    assert mine['images/val/0000.jpg'] != mine['images/train/0000.jpg']


@pytest.mark.parametrize(('split', 'number'), [('train', 6), ('val', 2)])
def test_layout(root, split, number):
    images = sorted((root / 'images' / split).glob('*.jpg'))
    maps = sorted((root / 'annotations' / split).glob('*.png'))
    assert [p.stem for p in images] == [p.stem for p in maps] == [f'{i:04d}' for i in range(number)]
    assert np.asarray(Image.open(images[0])).shape == (*SIZE, 3)
    semantic = np.asarray(Image.open(maps[0]))
    assert semantic.shape == SIZE
    assert semantic.dtype == np.uint8
    assert set(np.unique(semantic)) <= {*range(len(CLASSES)), 255}
    assert [image['file_name'] for image in load_coco(root, split)['images']] == [
        path.name for path in images
    ]


@pytest.mark.parametrize('split', ['train', 'val'])
def test_instances_agree_with_the_semantic_map(root, split):
    coco = load_coco(root, split)
    names = {category['id']: category['name'] for category in coco['categories']}
    assert tuple(names.values()) == THING_CLASSES
    assert len({annotation['id'] for annotation in coco['annotations']}) == len(coco['annotations'])
    for image in coco['images']:
        path = root / 'annotations' / split / image['file_name'].replace('.jpg', '.png')
        semantic = np.asarray(Image.open(path))
        covered = np.zeros(SIZE, int)
        for annotation in coco['annotations']:
            if annotation['image_id'] != image['id']:
                continue
            mask = coco_mask.decode(annotation['segmentation'])
            covered += mask
            assert np.all(semantic[mask > 0] == CLASSES.index(names[annotation['category_id']]))
            assert annotation['area'] == mask.sum()
            rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
            width, height = np.ptp(columns) + 1, np.ptp(rows) + 1
            assert annotation['bbox'] == [columns[0], rows[0], width, height]
        things = (semantic >= len(CLASSES) - len(THING_CLASSES)) & (semantic != 255)
        np.testing.assert_array_equal(covered, things)


def test_all_classes_occur_and_sizes_differ(tmp_path):
    root = write_scenes(tmp_path / 'full', 12, 1)
    found = [np.unique(np.asarray(Image.open(path))) for path in root.glob('annotations/train/*')]
    assert set(np.concatenate(found)) >= set(range(len(CLASSES)))
    sides = [max(a['bbox'][2:]) for a in load_coco(root, 'train')['annotations']]
    assert min(sides) <= 16
    assert max(sides) >= 60


def test_palette_has_one_colour_per_class():
    assert len(set(PALETTE)) == len(CLASSES)


def test_complete_dataset_is_reused_and_a_changed_one_replaced(tmp_path):
    root = write_scenes(tmp_path / 'scenes', 2, 1, size=SIZE)
    image = root / 'images/train/0000.jpg'
    before = image.stat().st_mtime_ns
    write_scenes(root, 2, 1, size=SIZE)
    assert image.stat().st_mtime_ns == before

    image.unlink()
    write_scenes(root, 2, 1, size=SIZE)
    assert image.exists()
    write_scenes(root, 3, 1, size=SIZE)
    assert len(list((root / 'images/train').iterdir())) == 3
    assert list(tmp_path.iterdir()) == [root]


def test_interrupted_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(scene, image_id, first_id):
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes_module, '_coco_annotations', fail)
    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / 'scenes', 2, 1, size=SIZE)
    assert list(tmp_path.iterdir()) == []


def test_files_of_others_are_not_touched(tmp_path):
    (tmp_path / 'mine.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='holds other files'):
        write_scenes(tmp_path, 2, 1, size=SIZE)
    assert (tmp_path / 'mine.txt').read_text() == 'mine'


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(num_train=0), r'num_train must be at least 1, got 0'),
        (dict(num_val=-1), r'num_val must be at least 1, got -1'),
        (dict(size=(32, 128)), r'size must be .* at least 64, got \(32, 128\)'),
        (dict(seed=-1), r'seed must be at least 0, got -1'),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_scenes(tmp_path / 'scenes', **{'num_train': 1, 'num_val': 1, **arguments})
