"""mmdynsparse.deployment.quantization."""

import numpy as np
import pytest

from mmdynsparse.deployment.graph import build_graph
from mmdynsparse.deployment.runtime import Session

from .conftest import HW, segmentor

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
from mmdynsparse.deployment.export import describe, export_model  # noqa: E402


def images(count: int, seed: int) -> list[np.ndarray]:
    """Smooth ones: neighbouring pixels of a photograph are alike."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 9, 11, 3), np.uint8)
    return [x.repeat(8, axis=0).repeat(8, axis=1) for x in coarse]


@pytest.mark.parametrize('batch', [2, None])
def test_weights_are_8_bits_and_outputs_alike(tmp_path, exported, batch: int | None) -> None:
    model, path = segmentor(), tmp_path / 'int8.onnx'
    graph = build_graph(model, HW)
    meta = dict(classes=('a', 'b', 'c'), palette=[[0, 0, 0], [9, 9, 9], [7, 0, 7]])
    export_model(graph, path, describe(graph, meta), batch, calibration=images(4, seed=0))

    file = onnx.load(path).graph
    kinds = [node.op_type for node in file.node]
    weights = [x for x in file.initializer if x.data_type == onnx.TensorProto.INT8 and x.dims]
    assert kinds.count('QuantizeLinear') > 5
    assert len(weights) >= kinds.count('Conv') + kinds.count('Gemm') > 5
    float_session = Session(exported('dynamic', model, batch=None), threads=1)
    session = Session(path, threads=1)
    assert session.metadata == float_session.metadata
    new = np.stack(images(2, seed=1)).transpose(0, 3, 1, 2)
    (out,), (expected,) = session(new), float_session(new)
    assert 0 < np.abs(out - expected).mean() < 0.2 * expected.std()
    assert [p.name for p in tmp_path.iterdir()] == ['int8.onnx']


def test_a_package_is_not_quantized(tmp_path) -> None:
    graph = build_graph(segmentor(), HW)
    with pytest.raises(ValueError, match=r'calibration must be \(\) for a .pt2 file, got 1 images'):
        export_model(
            graph, tmp_path / 'x.pt2', describe(graph, None), calibration=images(1, seed=0)
        )
    assert not list(tmp_path.iterdir())
