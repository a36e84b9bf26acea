"""Keep maps drawn over an input image."""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from ..models.decider import Decider, deciders
from ..models.sparsity import RegionSparsity
from ..ops import Decision, location_mask

LABEL_HEIGHT = 18  # px
GAP = 4  # px between panels
TINT = (40, 80, 200)  # RGB that dropped locations are mixed with, in equal parts


def check_drawable(model: nn.Module) -> None:
    """Check that a model's decisions are about whole images.

    Raises:
        ValueError: If it is not sparse, or tested in windows.
    """
    if not deciders(model):
        raise ValueError(f'keep maps need a sparse part, got a {type(model).__name__} without one')
    mode = (getattr(model, 'test_cfg', None) or {}).get('mode')
    if mode == 'slide':
        raise ValueError(
            "model.test_cfg.mode must be 'whole' for keep maps, because decisions of windows are "
            "not about the image, got 'slide'"
        )


def keep_map_row(model: nn.Module, batch: dict, scale: float = 1.0) -> np.ndarray:
    """Draw the image that a model has just seen with what each of its sparse parts keeps.

    What a RoI head keeps is what the boxes of the kept proposals cover.

    Args:
        model: The model, in eval mode, after ``test_step`` on the batch.
        batch: One image, as a data loader gives it.
        scale: Size of the panels to that of the network's input. Defaults to 1.0.

    Returns:
        (H', W', 3) uint8 RGB, see :func:`draw_keep_maps`.

    Raises:
        ValueError: As of :func:`check_drawable`.
    """
    check_drawable(model)
    image = batch['inputs'][0].numpy()[::-1].transpose(1, 2, 0)  # OpenMMLab loads BGR
    height, width = model.data_preprocessor(batch)['inputs'].shape[2:]
    padding = (0, height - image.shape[0]), (0, width - image.shape[1]), (0, 0)
    image = Image.fromarray(np.pad(image, padding))
    image = np.asarray(image.resize((round(width * scale), round(height * scale))))
    decisions = [d for decider in _of_maps(model).values() for d in decider.decisions]
    labels = decision_labels(model)
    if boxes := getattr(getattr(model, 'roi_head', None), 'kept_boxes', None):
        decisions.append(_covered(boxes[0], (height, width)))
        labels.append(f'in the {len(boxes[0])} kept proposals')
    return draw_keep_maps(image, decisions, 0, labels)


def decision_labels(model: nn.Module) -> list[str]:
    """Say where each decision of a model is made, in the words of its config counted from 1.

    A backbone's are 'stage 3' or, where a stage has several, 'stage 3, block 2'; those of a vision
    transformer 'layer 4'; others have the name of their part. Decisions about proposals and
    detections are about no map, and get no label.
    """
    labels = []
    for name, decider in _of_maps(model).items():
        locations = getattr(decider.sparsity, 'locations', None)
        if locations is None:
            labels.append(name or 'model')
            continue
        one_stage = hasattr(model.get_submodule(name), 'layers')
        for stage, blocks in locations.items():
            for block in blocks:
                several = f'stage {stage + 1}, block {block + 1}' if len(blocks) > 1 else ''
                label = f'layer {block + 1}' if one_stage else several or f'stage {stage + 1}'
                labels.append(label)
    return labels


def draw_keep_maps(
    image: np.ndarray,
    decisions: Sequence[Decision],
    index: int,
    labels: Sequence[str] | None = None,
) -> np.ndarray:
    """Draw an image and, to its right, what each predictor keeps of it.

    Kept locations show the image unchanged, dropped ones a grey version in a blue tint. Above each
    panel stand its label and the share of locations kept in this image.

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
    panels = [labelled_panel(image, 'input')]
    for decision, label in zip(decisions, labels, strict=True):
        batch = len(decision.mask)
        if not 0 <= index < batch:
            raise ValueError(f'index must be in [0, {batch - 1}], got {index}')
        keep = location_mask(decision)[index].view(decision.hw).detach().cpu().numpy() > 0.5
        share = decision.mask[index].mean().item()
        panels.append(labelled_panel(_tint_dropped(image, keep), f'{label}: {share:.0%} kept'))
    gap = np.full((panels[0].shape[0], GAP, 3), 255, np.uint8)
    return np.concatenate([part for panel in panels for part in (panel, gap)][:-1], axis=1)


def _covered(boxes_N4: Tensor, hw: tuple[int, int]) -> Decision:
    """Return the decision that keeps the pixels of an image that lie in a box."""
    mask = torch.zeros(hw)
    for x1, y1, x2, y2 in boxes_N4.round().int().tolist():
        mask[y1:y2, x1:x2] = 1
    return Decision(mask.view(1, -1), mask.view(1, -1), hw, 1.0)


def _of_maps(model: nn.Module) -> dict[str, Decider]:
    """Return the deciders of a model that decide about locations of maps."""
    found = deciders(model)
    return {n: d for n, d in found.items() if not isinstance(d.sparsity, RegionSparsity)}


def _tint_dropped(image: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Tint where a map ``keep`` (h, w) is false in ``image`` (H, W, 3)."""
    height, width = image.shape[:2]
    keep = cv2.resize(keep.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    # A tint, because darker or brighter would hide what is dark or bright already.
    tinted = (0.5 * image.mean(axis=2, keepdims=True) + 0.5 * np.array(TINT)).astype(np.uint8)
    return np.where(keep[..., None] > 0, image, tinted)


def labelled_panel(panel: np.ndarray, text: str) -> np.ndarray:
    """Put a line of text above a picture (H, W, 3) uint8."""
    bar = Image.new('RGB', (panel.shape[1], LABEL_HEIGHT), 'white')
    ImageDraw.Draw(bar).text((2, 2), text, fill='black', font=ImageFont.load_default(12))
    return np.concatenate([np.asarray(bar), panel])
