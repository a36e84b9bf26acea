"""Keep maps drawn over an input image."""

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..ops import Decision, location_mask

LABEL_HEIGHT = 18  # px
GAP = 4  # px between panels


def draw_keep_maps(
    image: np.ndarray,
    decisions: Sequence[Decision],
    index: int,
    labels: Sequence[str] | None = None,
) -> np.ndarray:
    """Draw an image and, to its right, what each predictor keeps of it.

    Kept locations show the image unchanged, dropped ones a dark grey version. Above each panel
    stand its label and the share of locations kept in this image.

    Args:
        image: (H, W, 3) uint8 RGB, the network's input before normalisation, padding included.
        decisions: Decisions of one forward pass.
        index: Position of the image in the batch.
        labels: One label per decision. Defaults to None, 'predictor 0', 'predictor 1', ...

    Returns:
        (H', W', 3) uint8 RGB: the panels in one row.

    Raises:
        ValueError: ``image`` is not (H, W, 3) uint8, ``index`` lies outside the batch, or the
            number of labels differs from the number of decisions.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f'image must be (H, W, 3) uint8, got {image.shape} {image.dtype}')
    if labels is None:
        labels = [f'predictor {i}' for i in range(len(decisions))]
    if len(labels) != len(decisions):
        raise ValueError(f'labels must have {len(decisions)} entries, got {len(labels)}')
    panels = [_labelled(image, 'input')]
    for decision, label in zip(decisions, labels, strict=True):
        batch = len(decision.mask)
        if not 0 <= index < batch:
            raise ValueError(f'index must be in [0, {batch - 1}], got {index}')
        keep = location_mask(decision)[index].view(decision.hw).detach().cpu().numpy() > 0.5
        share = decision.mask[index].mean().item()
        panels.append(_labelled(_dim_dropped(image, keep), f'{label}: {share:.0%} kept'))
    gap = np.full((panels[0].shape[0], GAP, 3), 255, np.uint8)
    return np.concatenate([part for panel in panels for part in (panel, gap)][:-1], axis=1)


def _dim_dropped(image: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Darken where a map ``keep`` (h, w) is false in ``image`` (H, W, 3)."""
    height, width = image.shape[:2]
    keep = cv2.resize(keep.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    grey = (0.3 * image.mean(axis=2, keepdims=True)).astype(np.uint8)
    return np.where(keep[..., None] > 0, image, grey)


def _labelled(panel: np.ndarray, text: str) -> np.ndarray:
    bar = Image.new('RGB', (panel.shape[1], LABEL_HEIGHT), 'white')
    ImageDraw.Draw(bar).text((2, 2), text, fill='black', font=ImageFont.load_default(12))
    return np.concatenate([np.asarray(bar), panel])
