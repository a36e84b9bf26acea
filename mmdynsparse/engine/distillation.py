"""Losses between a student and a teacher, and what they compare.

All losses are means over images of a mean over each image, so they do not depend on how a batch is
split. Dimension letters: B images, C channels or classes, A anchors of a location, H and W of a
map, R regions of interest.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.calls import Call
from ..ops import Decision, location_mask

# Modules of mmseg's segmentors and mmdet's detectors.
SEGMENTOR, RPN = 'decode_head', 'rpn_head'
ROI_HEAD = 'roi_head'
ROI, ROI_INPUT = 'roi_head.bbox_head', 'roi_head.bbox_roi_extractor'
IN_ROI_HEAD = f'{ROI_HEAD}.'
LOSS_NAMES = {SEGMENTOR: 'logits', RPN: 'rpn', ROI: 'roi'}


class Batch(NamedTuple):
    """What both models look at."""

    images: Tensor  # (B, 3, H, W), padded
    samples: Sequence = ()  # data samples, whose img_shape is the size without padding
    # For a detector's second stage, regions (R, 5): index of the image, corners in px.
    rois: Tensor | None = None


def parse_weight(name: str, value: object) -> tuple[float | tuple[float, ...], bool]:
    """Return a weight of features as a config has it, and whether only kept locations count.

    Raises:
        ValueError: If it is not a number of at least 0, a list of them, or a dict of such a weight
            and perhaps ``kept_only``.
    """
    kept_only = False
    if isinstance(value, Mapping):
        if not {'weight'} <= set(value) <= {'weight', 'kept_only'}:
            raise ValueError(f'{name} takes weight and perhaps kept_only, got {dict(value)}')
        kept_only = value.get('kept_only', False)
        name, value = f'{name}.weight', value['weight']
    if not isinstance(kept_only, bool):
        raise ValueError(f'kept_only beside {name} must be True or False, got {kept_only!r}')
    per_map = isinstance(value, list | tuple)
    weights = tuple(value) if per_map else (value,)
    if not weights or not all(isinstance(weight, Real) and weight >= 0 for weight in weights):
        where = ' for each map' if per_map else ''
        raise ValueError(f'{name} must be at least 0{where}, got {value!r}')
    return weights if per_map else value, kept_only


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
        rois: As in :class:`Batch`. Defaults to None, without a second stage.
    """
    extract = getattr(model, 'extract_feat', None) or model.backbone
    x = extract(images)
    parts = {name.split('.')[0] for name in names}
    if SEGMENTOR in parts and has_logit_map(model):
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
    earlier = [call for call in calls[:first] if call.name.split('.')[0] != ROI_HEAD]
    return [*earlier, *calls[first:]], calls[first].args[1]


def is_single(model: nn.Module, name: str) -> bool:
    """Return whether a model has a part, and has it once: cascades have lists of heads."""
    part = getattr(model, name, None)
    return isinstance(part, nn.Module) and not isinstance(part, nn.ModuleList)


def is_two_stage(model: nn.Module) -> bool:
    """Return whether a model has a second stage with one head for the boxes."""
    return is_single(getattr(model, ROI_HEAD, None), 'bbox_head')


def has_logit_map(model: nn.Module) -> bool:
    """Return whether a model has one decode head that returns a map of logits.

    Heads that mmseg takes over from mmdet classify queries, and cannot run without labels. That of
    K-Net returns the maps of all its rounds in training.
    """
    if not is_single(model, SEGMENTOR):
        return False
    return not any(hasattr(model.decode_head, x) for x in ('num_queries', 'kernel_update_head'))


def logit_heads(model: nn.Module) -> list[str]:
    """Return the names of the heads whose logits can be compared.

    Raises:
        ValueError: If the model is neither a segmentor with one head for the pixels nor a detector
            of two stages with one head for the boxes.
    """
    if has_logit_map(model):
        return [SEGMENTOR]
    if is_single(model, RPN) and is_two_stage(model):
        return [RPN, ROI]
    raise ValueError(
        'logit_weight needs a segmentor with one decode_head that returns a map of logits, or a '
        'detector with an rpn_head and one roi_head.bbox_head (set it to 0 elsewhere), '
        f'got {type(model).__name__}'
    )


def logit_loss(
    name: str,
    head: nn.Module,
    student: object,
    teacher: object,
    batch: Batch,
    temperature: float = 1.0,
    hard: bool = False,
) -> Tensor:
    """Divergence of the logits of pixels, anchors or regions; see ``kl_divergence``.

    Pixels with ignored labels, and anchors on padding, are left out.

    Args:
        name: Name of the head, ``SEGMENTOR``, ``RPN`` or ``ROI``.
        head: The student's.
        student: What it returned.
        teacher: The same of the teacher.
        batch: What both looked at.
        temperature: Divides the logits, > 0. Defaults to 1.
        hard: Whether the teacher's most likely class is a label. Defaults to False.

    Raises:
        ValueError: If the head returned no map of logits, or shapes differ.
    """

    def divergence(student: Tensor, teacher: Tensor, *losses: nn.Module) -> Tensor:
        if student.shape != teacher.shape:
            raise ValueError(
                f'teacher must have logits of the same width and stride in {name}, '
                f'{tuple(student.shape)}, got {tuple(teacher.shape)}'
            )
        sigmoid = any(getattr(loss, 'use_sigmoid', False) for loss in losses)
        if hard:
            return hard_cross_entropy(student, teacher, sigmoid)
        return kl_divergence(student, teacher, temperature, sigmoid)

    compare = {SEGMENTOR: _pixel_loss, RPN: _anchor_loss, ROI: _region_loss}[name]
    return compare(head, student, teacher, batch, divergence)


def _pixel_loss(
    head: nn.Module, student: object, teacher: object, batch: Batch, divergence: Callable
) -> Tensor:
    if not isinstance(student, Tensor):
        raise ValueError(
            'logit_weight needs a decode_head that returns one map of logits in training '
            f'(set it to 0 elsewhere), got a {type(student).__name__} of {type(head).__name__}'
        )
    losses = head.loss_decode if isinstance(head.loss_decode, nn.ModuleList) else [head.loss_decode]
    kl_BHW = divergence(student, teacher, *losses)
    if not batch.samples:
        return mean_over_images(kl_BHW, torch.ones_like(kl_BHW))
    weights = label_mask(batch.samples, kl_BHW.shape[-2:], head.ignore_index)
    return mean_over_images(kl_BHW, weights)


def _anchor_loss(
    head: nn.Module, student: Sequence, teacher: Sequence, batch: Batch, divergence: Callable
) -> Tensor:
    levels = []
    for s, t in zip(student[0], teacher[0], strict=True):
        # The channels are those of each anchor in turn.
        pair = (x.unflatten(1, (-1, head.cls_out_channels)).transpose(1, 2) for x in (s, t))
        kl_BHW = divergence(*pair, head.loss_cls).mean(1)
        levels.append((kl_BHW, content_mask(batch, s.shape)))
    # Every anchor counts alike, whatever its level.
    kl, inside = (torch.cat([x.flatten(1) for x in xs], 1) for xs in zip(*levels, strict=True))
    return mean_over_images(kl, inside)


def _region_loss(
    head: nn.Module, student: Sequence, teacher: Sequence, batch: Batch, divergence: Callable
) -> Tensor:
    return mean_over_rois(divergence(student[0], teacher[0], head.loss_cls), batch)


def feature_loss(
    name: str,
    student: object,
    teacher: object,
    batch: Batch,
    weight: float | Sequence[float] = 1.0,
    kept_only: bool = False,
) -> Tensor:
    """Mean squared errors, weighted, of the maps that a module of both models returns.

    Padding of the images is left out.

    Args:
        name: Of the module. One in ``roi_head`` returns tensors (R, ...) of the batch's regions.
        student: A tensor or nested sequences of tensors; of 4-D ones (B, C, H, W) the padding is
            known.
        teacher: The same of the teacher.
        batch: What both looked at.
        weight: A number, of the mean over all maps, those of several calls too, or one for each
            map. Defaults to 1.
        kept_only: Whether to leave out what the last decision that comes with the student's maps
            drops. Defaults to False.

    Raises:
        ValueError: If number or shape of the maps differ, they are not one for each region or
            weight, or they come without decisions.
    """
    students, teachers = list(_maps(student)), list(_maps(teacher))
    shapes, expected = ([tuple(x.shape[1:]) for x, _ in maps] for maps in (students, teachers))
    if shapes != expected or not shapes:
        raise ValueError(
            f"features need as many maps, of the same width and stride, got of '{name}' (without "
            f'the batch) {shapes} in the student and {expected} in the teacher'
        )
    weights = [1.0] * len(shapes) if isinstance(weight, Real) else weight
    if len(weights) != len(shapes):
        raise ValueError(
            f'features[{name!r}] must have a weight for each of {len(shapes)} maps, got {weight}'
        )
    if kept_only and any(decision is None for _, decision in students):
        raise ValueError(
            f'kept_only must be False in features[{name!r}], whose maps come without decisions '
            '(those of sparse backbones and FPNs have them), got True'
        )
    errors = [
        w * _map_error(name, s, t, batch, decision if kept_only else None)
        for w, (s, decision), (t, _) in zip(weights, students, teachers, strict=True)
        if w
    ]
    if isinstance(weight, Real):
        return weight * torch.stack(errors).mean()
    return torch.stack(errors).sum()


def _map_error(
    name: str, student: Tensor, teacher: Tensor, batch: Batch, decision: Decision | None
) -> Tensor:
    error = (student.float() - teacher.float()).square()
    if batch.rois is not None and name.startswith(IN_ROI_HEAD):
        if len(student) != len(batch.rois):
            raise ValueError(
                f'features in roi_head need one map for each of {len(batch.rois)} regions, got '
                f"{len(student)} of '{name}'"
            )
        return mean_over_rois(error.flatten(1).mean(1), batch)
    if student.ndim != 4:
        return error.mean()
    weights = content_mask(batch, student.shape)
    if decision is not None:
        weights = weights * kept_mask(decision, tuple(student.shape[-2:]))
    return mean_over_images(error.mean(1), weights)


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


def hard_cross_entropy(student: Tensor, teacher: Tensor, sigmoid: bool) -> Tensor:
    """Cross-entropy of logits (B, C, ...) with the teacher's decision as the label.

    Source: Touvron et al., *Training data-efficient image transformers* (arXiv 2012.12877), hard
    distillation.

    Args:
        student: Logits of the student.
        teacher: Logits of the teacher.
        sigmoid: Whether each class is a decision of its own; their losses are added.

    Returns:
        (B, ...) float32.
    """
    student = student.float()
    if sigmoid:
        labels = (teacher > 0).float()
        return F.binary_cross_entropy_with_logits(student, labels, reduction='none').sum(1)
    return F.cross_entropy(student, teacher.argmax(1), reduction='none')


def mean_over_images(values_BHW: Tensor, weights_BHW: Tensor) -> Tensor:
    """Return the mean over images of the weighted mean over each; 0 for one without weight."""
    sums_B = (values_BHW * weights_BHW).flatten(1).sum(1)
    return (sums_B / weights_BHW.flatten(1).sum(1).clamp(min=1)).mean()


def mean_over_rois(values_R: Tensor, batch: Batch) -> Tensor:
    """Return the mean over images of the mean over the regions of each; 0 for one without."""
    images_R, count = batch.rois[:, 0].long(), len(batch.images)
    sums_B = values_R.new_zeros(count).index_add(0, images_R, values_R)
    return (sums_B / images_R.bincount(minlength=count).clamp(min=1)).mean()


def content_mask(batch: Batch, shape: torch.Size) -> Tensor:
    """Return (B, H, W) float32, 1 where a map (B, C, H, W) lies on the image, 0 on padding."""
    (b, _, h, w), image_hw, device = shape, tuple(batch.images.shape[-2:]), batch.images.device
    sizes = [getattr(s, 'metainfo', {}).get('img_shape', image_hw)[:2] for s in batch.samples]
    sizes_B2 = torch.tensor(sizes or [image_hw] * b, device=device)
    # A location lies on the image if it begins within it.
    rows_BH = torch.arange(h, device=device) * image_hw[0] < sizes_B2[:, :1] * h
    cols_BW = torch.arange(w, device=device) * image_hw[1] < sizes_B2[:, 1:] * w
    return (rows_BH[:, :, None] & cols_BW[:, None, :]).float()


def label_mask(samples: Sequence, hw: tuple[int, int], ignore_index: int) -> Tensor:
    """Return (B, H, W) float32, 1 where the labels, resized to ``hw``, are not to be ignored."""
    labels_B1HW = torch.stack([sample.gt_sem_seg.data for sample in samples])
    resized = F.interpolate(labels_B1HW.float(), size=hw, mode='nearest')
    return (resized[:, 0] != ignore_index).float()


def kept_mask(decision: Decision, hw: tuple[int, int]) -> Tensor:
    """Return (B, H, W) float32, 1 where a decision keeps a location of a map of size ``hw``.

    A map of another size than the decision's takes the nearest decision.
    """
    mask_B1HW = location_mask(decision).detach().unflatten(1, decision.hw).unsqueeze(1)
    resized = F.interpolate(mask_B1HW, size=hw, mode='nearest')
    return (resized[:, 0] > 0.5).float()


def _maps(
    outputs: object, decision: Decision | None = None
) -> Iterator[tuple[Tensor, Decision | None]]:
    """Yield the tensors of nested outputs, each with the last decision that it comes with."""
    if isinstance(outputs, Tensor):
        yield outputs, decision
    elif isinstance(outputs, list | tuple):
        *_, decision = decision, *getattr(outputs, 'decisions', ())
        for output in outputs:
            yield from _maps(output, decision)
