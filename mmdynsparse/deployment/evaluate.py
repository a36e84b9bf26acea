"""Exported models in place of a config's model, for mmengine's test loop."""

from collections.abc import Sequence

import numpy as np
import torch
from mmengine.model import BaseModel
from mmengine.structures import PixelData
from torch import Tensor, nn

from ..models.calls import replaced_methods
from .graph import dense_head
from .runtime import ExportedSegmentor, Session, fit


class ExportedSegmentorModel(BaseModel):
    """An exported segmentor with the interface of mmseg's segmentors.

    Args:
        segmentor: The exported model.
    """

    def __init__(self, segmentor: ExportedSegmentor) -> None:
        super().__init__()
        self.segmentor = segmentor

    def forward(self, inputs: Sequence[Tensor], data_samples: list, mode: str) -> list:
        """Set the prediction of each sample, of its original size, for images (3, H, W)."""
        for image, sample in zip(inputs, data_samples, strict=True):
            mask = self.segmentor(_pixels(image), tuple(sample.ori_shape[:2]))
            sample.pred_sem_seg = PixelData(data=torch.from_numpy(mask.astype(np.int64))[None])
        return data_samples


class ExportedDetectorModel(BaseModel):
    """A detector of mmdet whose backbone, neck and dense head are those of a file.

    Args:
        session: The exported part.
        detector: The model with the weights of its RoI heads, in eval mode.
    """

    def __init__(self, session: Session, detector: nn.Module) -> None:
        super().__init__()
        self.session, self.detector = session, detector

    def forward(self, inputs: Sequence[Tensor], data_samples: list, mode: str) -> list:
        """Return the samples with detections, for images (3, H, W).

        Raises:
            ValueError: If an image is larger than the exported size.
        """
        return [
            self._detect(image, sample) for image, sample in zip(inputs, data_samples, strict=True)
        ]

    def _detect(self, image: Tensor, sample: object) -> object:
        metadata = self.session.metadata
        if any(s > m for s, m in zip(image.shape[1:], metadata.size, strict=True)):
            raise ValueError(
                f'images must fit into the exported size {metadata.size}, got '
                f'{tuple(image.shape[1:])}: export a larger one, or let the test pipeline resize'
            )
        pixels, _ = fit(_pixels(image), metadata, enlarge=False)
        sample.set_metainfo(dict(batch_input_shape=metadata.padded_size))
        outputs = [torch.from_numpy(x) for x in self.session(pixels)]
        features, predictions = _grouped(metadata.outputs, outputs)
        heads = {dense_head(self.detector): lambda maps: predictions}
        detectors = {self.detector: lambda images: features}
        with replaced_methods(heads), replaced_methods(detectors, 'extract_feat'):
            return self.detector.predict(pixels, [sample])[0]


def _pixels(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).contiguous().numpy()


def _grouped(
    names: Sequence[str], outputs: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[list[Tensor], ...]]:
    """Return the feature maps, and for each output of the dense head its levels."""
    features, predictions = [], {}
    for name, output in zip(names, outputs, strict=True):
        if name.startswith('feature_'):
            features.append(output)
        else:
            predictions.setdefault(name.split('_')[1], []).append(output)
    return tuple(features), tuple(predictions.values())
