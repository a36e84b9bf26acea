"""What is exported of a model: raw images in, predictions out."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.distillation import is_single
from ..models.decider import deciders


class SegmentorGraph(nn.Module):
    """A segmentor from raw images to logits, or to the class of every pixel.

    Args:
        model: An encoder-decoder of mmseg with one head, in eval mode.
        size: Height and width of the images, in px.
        argmax: Whether the output is the class of every pixel, int64 (B, H, W); else it is the
            head's logits (B, classes, h, w) of the padded image.

    Raises:
        ValueError: If the model has several heads, or none.
    """

    outputs = ('logits',)

    def __init__(self, model: nn.Module, size: tuple[int, int], argmax: bool = False) -> None:
        super().__init__()
        if not is_single(model, 'decode_head'):
            raise ValueError(
                f'model must be a segmentor with one decode_head, got a {type(model).__name__}'
            )
        self.images, self.model, self.argmax = Preprocessing(model, size), model, argmax
        if argmax:
            self.outputs = ('mask',)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Return the only output for images (B, 3, H, W), uint8."""
        head = self.model.decode_head
        x = self.images(images)
        logits = head.forward(self.model.extract_feat(x))
        if not self.argmax:
            return (logits,)
        logits = F.interpolate(
            logits, x.shape[2:], mode='bilinear', align_corners=head.align_corners
        )
        logits = logits[:, :, : self.images.size[0], : self.images.size[1]]
        if head.out_channels == 1:
            return ((logits[:, 0].sigmoid() > head.threshold).long(),)
        return (logits.argmax(1),)


class BackboneGraph(nn.Module):
    """A backbone from raw images to its feature maps, to time it.

    Args:
        model: The model that has it, in eval mode.
        size: Height and width of the images, in px.
    """

    def __init__(self, model: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.images, self.model = Preprocessing(model, size), model
        with torch.no_grad():
            features = self(torch.zeros(1, 3, *size, dtype=torch.uint8))
        self.outputs = [f'feature_{i}' for i in range(len(features))]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the feature maps of images (B, 3, H, W), uint8."""
        return tuple(self.model.backbone(self.images(images)))


class DetectorGraph(nn.Module):
    """A detector from raw images to its feature maps and what its dense head says of them.

    The dense head is the RPN of a two-stage detector, or else the only head. Post-processing and
    RoI heads, whose shapes depend on values, are not exported.

    Args:
        model: A detector of mmdet, in eval mode.
        size: Height and width of the images, in px.

    Raises:
        ValueError: If the model has no dense head.
    """

    def __init__(self, model: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.images, self.model = Preprocessing(model, size), model
        with torch.no_grad():
            features, predictions = self._run(torch.zeros(1, 3, *size, dtype=torch.uint8))
        self.outputs = [f'feature_{i}' for i in range(len(features))]
        for i, maps in enumerate(predictions):
            self.outputs += [f'head_{i}_{level}' for level in range(len(maps))]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return feature maps, and each of the head's outputs level by level."""
        features, predictions = self._run(images)
        return (*features, *(x for maps in predictions for x in maps))

    def _run(self, images: Tensor) -> tuple[Sequence[Tensor], Sequence[Sequence[Tensor]]]:
        features = self.model.extract_feat(self.images(images))
        return features, dense_head(self.model).forward(features)


class Preprocessing(nn.Module):
    """Normalization and padding as of a model's data preprocessor, for images of one size.

    Args:
        model: The model.
        size: Height and width of the images, in px.

    Attributes:
        padded_size: What they are padded to, at the right and at the bottom.
    """

    def __init__(self, model: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        data = model.data_preprocessor
        self.size = size
        self.padded_size, self.value = _padding(data, size)
        self.swaps = getattr(data, 'channel_conversion', getattr(data, '_channel_conversion', 0))
        for name, default in (('mean', 0.0), ('std', 1.0)):
            value = getattr(data, name, None)
            value = torch.full((3, 1, 1), default) if value is None else value
            self.register_buffer(name, value.float().view(3, 1, 1).clone())

    def forward(self, images: Tensor) -> Tensor:
        """Return what the backbone gets, (B, 3, H', W'), for images (B, 3, H, W)."""
        x = images.float()
        if self.swaps:
            x = x.flip(1)
        x = (x - self.mean) / self.std
        bottom, right = (p - s for p, s in zip(self.padded_size, self.size, strict=True))
        return F.pad(x, (0, right, 0, bottom), value=self.value) if bottom or right else x

    def channel_statistics(self) -> dict[str, list[float]]:
        """Return mean and standard deviation in the order of the image's channels."""
        step = -1 if self.swaps else 1
        return {name: getattr(self, name).flatten().tolist()[::step] for name in ('mean', 'std')}


def build_graph(
    model: nn.Module, size: tuple[int, int], argmax: bool = False, part: str = 'whole'
) -> SegmentorGraph | DetectorGraph | BackboneGraph:
    """Return the part of a model that is exported, in eval mode.

    Args:
        model: A segmentor of mmseg or a detector of mmdet.
        size: Height and width of the images, in px.
        argmax: Whether a segmentor returns classes in place of logits. Defaults to False.
        part: 'whole', or 'backbone' for the backbone alone. Defaults to 'whole'.

    Raises:
        ValueError: If a sparse part's selector has no static shapes, the backbone's gates are
            still searching, or the model has no part that can be exported.
    """
    pruning = getattr(getattr(model, 'backbone', None), 'pruning', None)
    if pruning is not None and pruning.search:
        raise ValueError(
            'model must be pruned before it is exported (tools/model_converters/'
            'prune_checkpoint.py), got a backbone with pruning.search=True'
        )
    for name, decider in deciders(model).items():
        selector = decider.sparsity.selector
        if selector not in ('topk', 'sampled'):
            raise ValueError(
                "sparsity.selector must be 'topk' or 'sampled' in an exported model, which keeps "
                f'the same number of locations in every image, got {selector!r} in {name}'
            )
    if part == 'backbone':
        return BackboneGraph(model, size).eval()
    if hasattr(model, 'decode_head'):
        return SegmentorGraph(model, size, argmax).eval()
    if argmax:
        raise ValueError('argmax must be False for a detector, got True')
    return DetectorGraph(model, size).eval()


def dense_head(model: nn.Module) -> nn.Module:
    """Return the RPN of a detector, or its only head.

    Raises:
        ValueError: If there is none.
    """
    head = getattr(model, 'rpn_head', None) or getattr(model, 'bbox_head', None)
    if head is None:
        raise ValueError(
            f'model must be a detector with an RPN or a one-stage head, got {type(model).__name__}'
        )
    return head


def _padding(data: nn.Module, size: tuple[int, int]) -> tuple[tuple[int, int], float]:
    """Return the size that a data preprocessor pads images to, and what it pads with."""
    if hasattr(data, 'seg_pad_val'):  # mmseg's
        test_cfg = data.test_cfg or {}
        divisor, value = test_cfg.get('size_divisor') or 1, data.pad_val
        least = test_cfg.get('size') or size
    else:
        divisor, value, least = data.pad_size_divisor, data.pad_value, size
    sides = (max(pair) for pair in zip(size, least, strict=True))
    return tuple(-(-side // divisor) * divisor for side in sides), float(value)
