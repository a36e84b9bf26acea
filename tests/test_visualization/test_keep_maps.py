import numpy as np
import pytest
import torch

from mmdynsparse.ops import Decision, keep_all
from mmdynsparse.visualization import draw_keep_maps
from mmdynsparse.visualization.keep_maps import GAP, LABEL_HEIGHT

H, W = 48, 96


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(60, 255, (H, W, 3), dtype=np.uint8)


@pytest.fixture
def decisions():
    """Two images; in the second one the first decision keeps only the cell (0, 1) of 2 x 3."""
    mask = torch.tensor([[1.0, 1, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0]], requires_grad=True)
    return [
        Decision(mask, torch.zeros_like(mask), (2, 3), 0.5),
        keep_all(2, (1, 1), torch.device('cpu')),
    ]


def panel(picture, i):
    return picture[LABEL_HEIGHT:, i * (W + GAP) : i * (W + GAP) + W]


def test_kept_cells_show_the_image_and_dropped_ones_a_tint(image, decisions):
    picture = draw_keep_maps(image, decisions, 1)
    assert picture.shape == (H + LABEL_HEIGHT, 3 * W + 2 * GAP, 3)
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(panel(picture, 0), image)
    np.testing.assert_array_equal(panel(picture, 2), image)

    sparse = panel(picture, 1)
    kept = np.zeros((H, W), bool)
    kept[: H // 2, W // 3 : 2 * W // 3] = True
    np.testing.assert_array_equal(sparse[kept], image[kept])
    dropped = sparse[~kept]
    assert np.all(dropped[:, 2] > dropped[:, 0] + 40)  # blue
    # What is there stays visible.
    assert np.corrcoef(dropped.mean(1), image[~kept].mean(1))[0, 1] > 0.99


def test_dropped_locations_of_a_dark_photo_are_visible(image, decisions):
    dark = draw_keep_maps(image // 8, decisions, 1)
    dropped = panel(dark, 1)[: H // 2, : W // 3]
    assert dropped.mean() > 2 * (image // 8).mean()


def test_the_index_chooses_the_image(image, decisions):
    np.testing.assert_array_equal(panel(draw_keep_maps(image, decisions, 0), 1), image)


def test_labels_are_drawn(image, decisions):
    one = draw_keep_maps(image, decisions, 1, labels=['a', 'b'])
    other = draw_keep_maps(image, decisions, 1, labels=['c', 'b'])
    different = (one != other).any(axis=(0, 2)).nonzero()[0]
    assert (one != other)[:LABEL_HEIGHT].any()
    assert not (one != other)[LABEL_HEIGHT:].any()
    assert different.min() >= W + GAP
    assert different.max() < 2 * W + GAP


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(image=np.zeros((4, 4, 3))), 'image must be .* got .* float64'),
        (dict(image=np.zeros((4, 4), np.uint8)), r'image must be .* got \(4, 4\)'),
        (dict(index=2), r'index must be in \[0, 1\], got 2'),
        (dict(labels=['a']), 'labels must have 2 entries, got 1'),
    ],
)
def test_bad_arguments(image, decisions, arguments, message):
    with pytest.raises(ValueError, match=message):
        draw_keep_maps(**{'image': image, 'decisions': decisions, 'index': 0, **arguments})
