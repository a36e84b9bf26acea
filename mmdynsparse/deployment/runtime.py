"""Exported models in the runtimes. ONNX needs neither torch nor OpenMMLab here."""

import json
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

BACKENDS = ('onnxruntime', 'openvino', 'aotinductor')
PACKAGE = '.pt2'  # suffix of AOTInductor's files
# Entry of the file's metadata that holds ``Metadata`` as JSON.
METADATA_KEY = 'mmdynsparse'


class Metadata(NamedTuple):
    """What an exported file knows of its model.

    Attributes:
        outputs: Names of the outputs: 'logits' or 'mask' of a segmentor, or those of a detector's
            feature maps, 'feature_LEVEL', and of its dense head, 'head_OUTPUT_LEVEL'.
        size: Height and width of the images, in px.
        padded_size: What the graph pads them to, at the right and at the bottom.
        classes: Names of the classes.
        palette: Their colours, RGB.
        mean: What the graph subtracts of each channel, in the order of the image's channels.
        std: What it divides by.
        channel_order: Order of the channels that the graph takes, 'bgr' or 'rgb': that of the
            images which the training pipeline loads.
        align_corners: How the logits are resized.
        threshold: Probability from which on a model with one logit says foreground, or None.
        keep_ratios: Those of each sparse part.
    """

    outputs: list[str]
    size: tuple[int, int]
    padded_size: tuple[int, int]
    classes: list[str]
    palette: list[list[int]]
    mean: list[float]
    std: list[float]
    channel_order: str
    align_corners: bool
    threshold: float | None
    keep_ratios: dict[str, list[float]]


class Session:
    """An exported model in one of the runtimes.

    Args:
        path: The file, of ONNX or a package of AOTInductor (.pt2).
        backend: One of ``BACKENDS``. Defaults to None, 'aotinductor' for a package, else
            'onnxruntime'.
        threads: Threads of one call; with AOTInductor those of torch in this process. Defaults to
            None, the runtime's own choice.

    Attributes:
        metadata: What the file says of the model.

    Raises:
        ValueError: If the backend is unknown, not installed or not one for this file, or
            ``export_onnx.py`` did not write it.
    """

    def __init__(
        self, path: str | os.PathLike, backend: str | None = None, threads: int | None = None
    ) -> None:
        is_package = os.fspath(path).endswith(PACKAGE)
        backend = backend or ('aotinductor' if is_package else 'onnxruntime')
        if backend not in BACKENDS:
            raise ValueError(f'backend must be one of {BACKENDS}, got {backend!r}')
        if threads is not None and threads < 1:
            raise ValueError(f'threads must be at least 1, got {threads}')
        if is_package != (backend == 'aotinductor'):
            kind = PACKAGE if backend == 'aotinductor' else '.onnx'
            raise ValueError(f'path must end in {kind!r} for {backend}, got {str(path)!r}')
        if not os.path.isfile(path):
            raise ValueError(f'path must be an existing file, got {str(path)!r}')
        load, needed = _LOADERS[backend]
        try:
            self._run, text = load(os.fspath(path), threads)
        except ImportError as error:
            raise ValueError(
                f'backend {backend!r} must be installed: pip install {needed} '
                f'(got {type(error).__name__}: {error})'
            ) from None
        except Exception as error:
            reason = ' '.join(str(error).split())[:200]
            raise ValueError(
                f'path must be a file that {backend} opens, got {str(path)!r} ({reason})'
            ) from error
        if text is None:
            raise ValueError(f'path must be a file of export_onnx.py, got {str(path)!r}')
        entries = json.loads(text)
        sizes = {name: tuple(entries[name]) for name in ('size', 'padded_size')}
        self.metadata = Metadata(**{**entries, **sizes})

    def __call__(self, images: np.ndarray) -> list[np.ndarray]:
        """Return the outputs for images (B, 3, H, W), uint8, of the size of the metadata."""
        return self._run(images)


class ExportedSegmentor:
    """A segmentor that was exported, as a function of images.

    Args:
        path: A file of ``export_onnx.py``, or one that has been opened.
        backend: As of :class:`Session`. Defaults to None.
        threads: As of :class:`Session`. Defaults to None.

    Attributes:
        metadata: Classes, palette and what else the file knows of the model.

    Raises:
        ValueError: As of :class:`Session`, or if the model is no segmentor.
    """

    def __init__(
        self,
        path: 'str | os.PathLike | Session',
        backend: str | None = None,
        threads: int | None = None,
    ) -> None:
        self._session = path if isinstance(path, Session) else Session(path, backend, threads)
        self.metadata = self._session.metadata
        if len(self.metadata.outputs) > 1:
            raise ValueError(f'path must be of a segmentor, got a detector in {str(path)!r}')

    def __call__(self, image: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
        """Return the class of every pixel.

        Args:
            image: (H, W, 3) uint8, channels in the order of ``metadata.channel_order`` (BGR, as
                ``cv2.imread`` gives them, for most models). One larger than the exported size, or
                smaller in both sides, is resized to fit into it, with its aspect ratio.
            size: Height and width of the mask. Defaults to None, those of the image.

        Returns:
            (H, W) uint8, or int32 where there are more than 256 classes.

        Raises:
            ValueError: If the image has another shape or dtype.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(
                f'image must be (H, W, 3) uint8, got {image.shape} of dtype {image.dtype}'
            )
        inputs, inside = fit(image, self.metadata)
        (output,) = self._session(inputs)
        size = size or image.shape[:2]
        if self.metadata.outputs == ['mask']:
            mask = _narrow(output[0, : inside[0], : inside[1]], len(self.metadata.classes))
            return _resize(mask, size, nearest=True)
        logits = np.ascontiguousarray(output[0].transpose(1, 2, 0))
        logits = _resize(logits, self.metadata.padded_size, corners=self.metadata.align_corners)
        logits = _resize(
            logits[: inside[0], : inside[1]], size, corners=self.metadata.align_corners
        )
        if self.metadata.threshold is not None:
            return (logits[..., 0] > np.log(1 / (1 / self.metadata.threshold - 1))).astype(np.uint8)
        return _narrow(logits.argmax(-1), logits.shape[-1])


def fit(
    image: np.ndarray, metadata: Metadata, enlarge: bool = True
) -> tuple[np.ndarray, tuple[int, int]]:
    """Bring an image to the exported size.

    One that does not fit is resized, with its aspect ratio. The rest is filled with the mean,
    which normalization turns into zero, the padding of OpenMMLab's data preprocessors.

    Args:
        image: (H, W, 3) uint8.
        metadata: That of the file.
        enlarge: Whether a smaller image is resized as well. Defaults to True.

    Returns:
        (1, 3, H, W) uint8, contiguous, and height and width of what the image takes of it.
    """
    size, inside = metadata.size, image.shape[:2]
    scale = min(s / i for s, i in zip(size, inside, strict=True))
    if scale < 1 or (scale > 1 and enlarge):
        inside = tuple(min(round(i * scale), s) for i, s in zip(inside, size, strict=True))
        image = _resize(image, inside)
    if inside != size:
        whole = np.empty((*size, 3), np.uint8)
        whole[:] = np.round(metadata.mean)
        whole[: inside[0], : inside[1]] = image
        image = whole
    return np.ascontiguousarray(image.transpose(2, 0, 1)[None]), inside


def _resize(
    x: np.ndarray, size: tuple[int, int], nearest: bool = False, corners: bool = False
) -> np.ndarray:
    if x.shape[:2] == tuple(size):
        return x
    if corners:
        return _between_corners(_between_corners(x, size[0]).swapaxes(0, 1), size[1]).swapaxes(0, 1)
    import cv2  # not needed where all images have the exported size

    kind = cv2.INTER_NEAREST if nearest else cv2.INTER_LINEAR
    resized = cv2.resize(x, tuple(size[::-1]), interpolation=kind)
    return resized.reshape(*size, *x.shape[2:])  # OpenCV drops a single channel


def _between_corners(x: np.ndarray, size: int) -> np.ndarray:
    """Resize the first axis linearly; its first and last entries stay what they are."""
    at = np.linspace(0, len(x) - 1, size, dtype=np.float32)
    before = np.minimum(at.astype(np.int64), max(len(x) - 2, 0))
    weight = (at - before).reshape(-1, *[1] * (x.ndim - 1))
    return x[before] * (1 - weight) + x[np.minimum(before + 1, len(x) - 1)] * weight


def _narrow(mask: np.ndarray, classes: int) -> np.ndarray:
    return mask.astype(np.uint8 if classes <= 256 else np.int32)


def _onnxruntime(path: str, threads: int | None) -> tuple[Callable, str | None]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    return (lambda images: session.run(None, {name: images})), text


def _openvino(path: str, threads: int | None) -> tuple[Callable, str | None]:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    options = dict(INFERENCE_PRECISION_HINT='f32')
    if threads:
        options['INFERENCE_NUM_THREADS'] = threads
    compiled = core.compile_model(model, 'CPU', options)
    entry = ['framework', METADATA_KEY]
    text = model.get_rt_info(entry).astype(str) if model.has_rt_info(entry) else None

    def run(images: np.ndarray) -> list[np.ndarray]:
        # A request of its own for each call: several threads may call.
        return list(compiled.create_infer_request().infer({0: images}).values())

    return run, text


def _aotinductor(path: str, threads: int | None) -> tuple[Callable, str | None]:
    import torch

    if threads:
        torch.set_num_threads(threads)
    package = torch._inductor.aoti_load_package(path)

    def run(images: np.ndarray) -> list[np.ndarray]:
        return [x.numpy() for x in package(torch.from_numpy(images))]

    return run, package.loader.get_metadata().get(METADATA_KEY)


# What opens a file, and what of pip has it.
_LOADERS = {
    'onnxruntime': (_onnxruntime, 'mmdynsparse[export]'),
    'openvino': (_openvino, 'mmdynsparse[openvino]'),
    'aotinductor': (_aotinductor, 'torch'),
}
