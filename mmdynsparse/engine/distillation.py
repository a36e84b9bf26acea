"""Losses between a student and a teacher, and what they compare.

All losses are means over images of a mean over each image, so they do not depend on how a batch is
split. Dimension letters: B images, C channels or classes, H and W of a map, R regions of interest.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Modules of mmseg's segmentors and mmdet's detectors.
SEGMENTOR, RPN = 'decode_head', 'rpn_head'
ROI_HEAD = 'roi_head'
ROI, ROI_INPUT = 'roi_head.bbox_head', 'roi_head.bbox_roi_extractor'


class Call(NamedTuple):
    """A call of a module: its name, the positional arguments and the output."""

    name: str
    args: tuple
    out: object


class Taps:
    """Record arguments and output of modules of a model while ``recording`` is set.

    Attributes:
        recording: Whether calls are recorded.
        calls: The recorded calls, in order.

    Args:
        model: The model.
        names: Names of modules of it.

    Raises:
        ValueError: If there is no module of a name.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.recording = False
        self.calls: list[Call] = []
        self._replaced: list[tuple[nn.Module, object]] = []
        for name in names:
            self._tap(name, find_module(model, name))

    def _tap(self, name: str, module: nn.Module) -> None:
        # Not a forward hook: heads of mmseg call their own ``forward``, past the hooks.
        forward = module.forward

        def tapped(*args, **kwargs):
            out = forward(*args, **kwargs)
            if self.recording:
                self.calls.append(Call(name, args, out))
            return out

        self._replaced.append((module, module.__dict__.get('forward')))
        module.forward = tapped

    def pop(self) -> list[Call]:
        """Stop recording and return what was recorded."""
        self.recording = False
        calls, self.calls = self.calls, []
        return calls

    def close(self) -> None:
        """Leave the modules as they were."""
        for module, forward in reversed(self._replaced):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def find_module(model: nn.Module, name: str) -> nn.Module:
    """Return a module by its name.

    Raises:
        ValueError: If there is none.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        children = ', '.join(child for child, _ in model.named_children())
        raise ValueError(
            f"features must name modules of {type(model).__name__} (in {children}), got '{name}'"
        ) from None


def run_parts(
    model: nn.Module, images: Tensor, names: Iterable[str], rois: Tensor | None = None
) -> None:
    """Run the parts of a segmentor or a detector in which modules lie, at most up to its logits.

    Args:
        model: The model.
        images: Preprocessed images (B, 3, H, W).
        names: Names of the modules. What runs in losses and post-processing only does not run.
        rois: For the second stage of a detector, regions (R, 5): index of the image, corners in
            px. Defaults to None, without the second stage.
    """
    extract = getattr(model, 'extract_feat', None) or model.backbone
    x = extract(images)
    parts = {name.split('.')[0] for name in names}
    # Those with queries cannot run without labels.
    if SEGMENTOR in parts and is_single(model, SEGMENTOR) and not has_queries(model.decode_head):
        model.decode_head.forward(x)
    if RPN in parts and is_single(model, RPN):
        model.rpn_head(x)
    if rois is not None:
        model.roi_head._bbox_forward(x, rois)  # what subclasses of mmdet's heads override


def second_stage(calls: Sequence[Call]) -> tuple[list[Call], Tensor]:
    """Return a training iteration's calls without those by which regions were sampled.

    Args:
        calls: Recorded calls, those of the second stage's RoI extractor and box head among them.

    Returns:
        The calls, those in the RoI head from the last one of the box head on, which is for its
        loss, or of the extractor for it; and its regions (R, 5).
    """
    names = [call.name for call in calls]
    last = len(names) - 1 - names[::-1].index(ROI)
    first = max(i for i in range(last) if names[i] == ROI_INPUT)
    in_head = [name.split('.')[0] == ROI_HEAD for name in names]
    kept = [call for i, call in enumerate(calls) if i >= first or not in_head[i]]
    return kept, calls[first].args[1]


def is_single(model: nn.Module, name: str) -> bool:
    """Return whether a model has a part, and has it once: cascades have lists of heads."""
    part = getattr(model, name, None)
    return isinstance(part, nn.Module) and not isinstance(part, nn.ModuleList)


def is_two_stage(model: nn.Module) -> bool:
    """Return whether a model has a second stage with one head for the boxes."""
    return is_single(getattr(model, ROI_HEAD, None), 'bbox_head')


def has_queries(head: nn.Module) -> bool:
    """Return whether a head classifies queries, as those that mmseg takes over from mmdet do."""
    return hasattr(head, 'num_queries')


def feature_loss(
    name: str,
    student: object,
    teacher: object,
    images: Tensor,
    samples: Sequence,
    rois: Tensor | None = None,
) -> Tensor:
    """Mean squared error between the maps that a module of both models returns.

    Padding of the images is left out. Several maps, and those of several calls, count alike.

    Args:
        name: Of the module, for the message.
        student: A tensor or nested sequences of tensors; of 4-D ones (B, C, H, W) the padding is
            known.
        teacher: The same of the teacher.
        images: The padded images (B, 3, H, W).
        samples: Data samples of the batch, whose ``img_shape`` is the size without padding.
        rois: For a module that looks at regions, which returns tensors (R, ...), the regions
            (R, 5) with the index of the image in front. Defaults to None, a module that looks at
            images.

    Raises:
        ValueError: If number or shape of the maps differ, or they are not one for each region.
    """
    students, teachers = list(_tensors(student)), list(_tensors(teacher))
    shapes, expected = ([tuple(x.shape[1:]) for x in maps] for maps in (students, teachers))
    if shapes != expected or not shapes:
        raise ValueError(
            f"features need as many maps, of the same width and stride, got of '{name}' (without "
            f'the batch) {shapes} in the student and {expected} in the teacher'
        )
    errors = []
    for s, t in zip(students, teachers, strict=True):
        error = (s.float() - t.float()).square()
        if rois is not None:
            if len(s) != len(rois):
                raise ValueError(
                    f'features in roi_head need one map for each of {len(rois)} regions, got '
                    f"{len(s)} of '{name}'"
                )
            error_R = error.flatten(1).mean(1)
            errors.append(mean_over_rois(error_R, rois[:, 0].long(), len(images)))
        elif s.ndim == 4:
            inside = content_mask(samples, s.shape, tuple(images.shape[-2:]), s.device)
            errors.append(mean_over_images(error.mean(1), inside))
        else:
            errors.append(error.mean())
    return torch.stack(errors).mean()


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float, sigmoid: bool) -> Tensor:
    """Divergence KL(teacher || student) for logits (B, C, ...), times the squared temperature.

    Args:
        student: Logits of the student.
        teacher: Logits of the teacher.
        temperature: Divides the logits, > 0.
        sigmoid: Whether each class is a decision of its own; their divergences are added.

    Returns:
        (B, ...) float32.
    """
    logits = [x.float() / temperature for x in (student, teacher)]
    dim = 1
    if sigmoid:
        # The class and its absence, which has the logit 0.
        logits = [torch.stack((x, torch.zeros_like(x)), 2) for x in logits]
        dim = 2
    log_s, log_t = (F.log_softmax(x, dim) for x in logits)
    kl = F.kl_div(log_s, log_t, reduction='none', log_target=True).sum(dim)
    return temperature**2 * (kl.sum(1) if sigmoid else kl)


def mean_over_images(values_BHW: Tensor, weights_BHW: Tensor) -> Tensor:
    """Return the mean over images of the weighted mean over each; 0 for one without weight."""
    sums_B = (values_BHW * weights_BHW).flatten(1).sum(1)
    return (sums_B / weights_BHW.flatten(1).sum(1).clamp(min=1)).mean()


def mean_over_rois(values_R: Tensor, images_R: Tensor, batch: int) -> Tensor:
    """Return the mean over images of the mean over the regions of each; 0 for one without."""
    sums_B = values_R.new_zeros(batch).index_add(0, images_R, values_R)
    return (sums_B / images_R.bincount(minlength=batch).clamp(min=1)).mean()


def content_mask(
    samples: Sequence, shape: torch.Size, image_hw: tuple[int, int], device: torch.device
) -> Tensor:
    """Return (B, H, W) float32, 1 where a map lies on the image and 0 on padding.

    Args:
        samples: Data samples; without them, or their ``img_shape``, there is no padding.
        shape: Of the map, (B, C, H, W).
        image_hw: Height and width of the padded images, in px.
        device: Of the result.
    """
    b, _, h, w = shape
    sizes = [getattr(s, 'metainfo', {}).get('img_shape', image_hw)[:2] for s in samples]
    sizes = sizes or [image_hw] * b
    rows = torch.tensor([_cells(size[0], h, image_hw[0]) for size in sizes], device=device)
    cols = torch.tensor([_cells(size[1], w, image_hw[1]) for size in sizes], device=device)
    rows_BH = torch.arange(h, device=device) < rows[:, None]
    cols_BW = torch.arange(w, device=device) < cols[:, None]
    return (rows_BH[:, :, None] & cols_BW[:, None, :]).float()


def label_mask(samples: Sequence, hw: tuple[int, int], ignore_index: int) -> Tensor:
    """Return (B, H, W) float32, 1 where the labels, resized to ``hw``, are not to be ignored."""
    labels_B1HW = torch.stack([sample.gt_sem_seg.data for sample in samples])
    resized = F.interpolate(labels_B1HW.float(), size=hw, mode='nearest')
    return (resized[:, 0] != ignore_index).float()


def _tensors(outputs: object) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, list | tuple):
        for output in outputs:
            yield from _tensors(output)


def _cells(length: int, cells: int, padded: int) -> int:
    """Number of cells, of those that cover the padded length, which begin within the length."""
    return -(-length * cells // padded)
