"""Static quantization of exported models to 8 bits, by ONNX Runtime's own tool."""

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

# Convolutions and linear layers. Attention's products and Winograd's form, both MatMul, stay in
# float32.
OPERATORS = ['Conv', 'Gemm']


def quantize(path: Path, batches: Iterable[np.ndarray]) -> None:
    """Quantize a file's weights and activations, in place.

    Args:
        path: A file of ``export_model``, of ONNX.
        batches: Images (B, 3, H, W), uint8, of the sizes that the graph takes; the ranges of its
            activations on them become those of the quantized model.
    """
    with TemporaryDirectory(dir=path.parent) as folder:
        prepared, quantized = Path(folder) / 'prepared.onnx', Path(folder) / 'quantized.onnx'
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            quantized,
            _Batches(batches),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=OPERATORS,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        quantized.replace(path)


class _Batches(CalibrationDataReader):
    def __init__(self, batches: Iterable[np.ndarray]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next input by its name, or None."""
        images = next(self._batches, None)
        return None if images is None else dict(images=images)
