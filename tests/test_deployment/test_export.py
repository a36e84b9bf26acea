"""mmdynsparse.deployment: export to ONNX and the runtimes."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mmdynsparse.deployment import ExportedSegmentor
from mmdynsparse.deployment.graph import build_graph
from mmdynsparse.deployment.runtime import Session, _resize
from mmdynsparse.models.decider import deciders

from .conftest import HW, detector, segmentor

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
from mmdynsparse.deployment.export import (  # noqa: E402
    check_operators,
    check_output,
    describe,
    export_model,
)


def noise(batch: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (batch, 3, *HW), np.uint8)


def in_torch(model: torch.nn.Module, images: np.ndarray) -> torch.Tensor:
    """The logits of mmseg's own steps, from raw images on."""
    data = model.data_preprocessor(
        dict(inputs=list(torch.from_numpy(images)), data_samples=[_Sample() for _ in images])
    )
    with torch.no_grad():
        return model.decode_head(model.extract_feat(data['inputs']))


class _Sample:
    def set_metainfo(self, meta: dict) -> None:
        pass


@pytest.mark.parametrize('backend', ['onnxruntime', 'openvino'])
def test_outputs_equal_torch_for_any_batch(exported, backend: str) -> None:
    pytest.importorskip(backend)
    model = segmentor()
    session = Session(exported('dynamic', model, batch=None), backend, threads=1)
    for batch in (1, 3):
        images = noise(batch, seed=batch)
        (out,) = session(images)
        np.testing.assert_allclose(out, in_torch(model, images), rtol=0, atol=1e-4)
    # A decision of random predictors that keeps everything, or nothing, would show little.
    kept = torch.cat([d.mask.flatten() for d in model.decode_head.decider.decisions])
    assert 0.2 < kept.mean() < 0.6


@pytest.mark.slow
@pytest.mark.parametrize('backend', ['onnxruntime', 'openvino'])
def test_sampled_decisions(exported, backend: str) -> None:
    pytest.importorskip(backend)
    model, images = segmentor('sampled'), noise(1)
    (out,) = Session(exported('sampled', model), backend)(images)
    np.testing.assert_allclose(out, in_torch(model, images), rtol=0, atol=1e-4)


class Decided(torch.nn.Module):
    """A segmentor's logits and the mask of each of its decisions."""

    def __init__(self, model: torch.nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.whole, self.masks = build_graph(model, size), []
        for decider in deciders(model).values():
            decider.register_forward_pre_hook(
                lambda _, args: self.masks.extend(d.mask for d in args[0])
            )
        # No module: torch.export takes one that has two names for another type.
        self.images = SimpleNamespace(size=size)
        self.outputs = ['logits', *(f'mask_{i}' for i in range(3))]

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.masks.clear()
        (logits,) = self.whole(images)
        return logits, *(mask.clone() for mask in self.masks)


@pytest.mark.slow
@pytest.mark.parametrize('size', [(480, 360), (345, 457)])
def test_the_same_cells_are_kept_at_any_size(size: tuple[int, int], tmp_path: Path) -> None:
    pytest.importorskip('openvino')
    model = segmentor()
    graph = Decided(model, size).eval()
    metadata = describe(build_graph(model, size), None)._replace(outputs=graph.outputs)
    export_model(graph, tmp_path / 'x.onnx', metadata, batch=None)
    for backend in ('onnxruntime', 'openvino'):
        session = Session(tmp_path / 'x.onnx', backend, threads=2)
        for batch in (1, 3):
            images = np.random.default_rng(batch).integers(0, 256, (batch, 3, *size), np.uint8)
            with torch.no_grad():
                expected = graph(torch.from_numpy(images))
            for out, other in zip(session(images), expected, strict=True):
                np.testing.assert_allclose(out, other, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_a_package_of_aotinductor_is_the_same_model(exported) -> None:
    model = segmentor()
    path = exported('package', model, batch=None, suffix='.pt2')
    session = Session(path, threads=1)
    for batch in (1, 3):
        images = noise(batch, seed=batch)
        (out,) = session(images)
        np.testing.assert_allclose(out, in_torch(model, images), rtol=0, atol=1e-4)
    assert session.metadata.classes == ['a', 'b', 'c'] and session.metadata.size == HW
    image = noise(1)[0].transpose(1, 2, 0)
    onnx_model = ExportedSegmentor(exported('dynamic', model, batch=None))
    np.testing.assert_array_equal(ExportedSegmentor(path)(image), onnx_model(image))
    assert not list(path.parent.glob('partial*'))


def test_the_graph_has_no_loops_and_knows_its_model(exported) -> None:
    path = exported('dynamic', segmentor(), batch=None)
    graph = onnx.load(path).graph
    kinds = {node.op_type for node in graph.node}
    assert not kinds & {'Loop', 'If', 'Scan'} and not any('Sequence' in kind for kind in kinds)
    assert {node.domain for node in graph.node} <= {'', 'ai.onnx'}
    metadata = Session(path).metadata
    assert metadata.size == HW and metadata.padded_size == HW
    assert metadata.classes == ['a', 'b', 'c'] and metadata.palette[2] == [7, 0, 7]
    assert metadata.mean == pytest.approx([103, 116, 123])
    assert metadata.keep_ratios == {'backbone': [0.5, 0.5], 'decode_head': [0.4]}


PRUNED = dict(mixers=[['conv3', 'none'], ['conv1']], hidden=[[7, 48], [0]])


@pytest.mark.parametrize('keep_ratio', [None, 0.7])
def test_pruned_models(exported, keep_ratio: float | None) -> None:
    """All operations but self-attention, an FFN that is gone, and what is then made sparse."""
    backbone = dict(pruning=PRUNED)
    if keep_ratio:
        backbone['sparsity'] = dict(locations={0: (0,), 1: (0,)}, keep_ratio=keep_ratio)
    model, images = segmentor(backbone=backbone), noise(1)
    (out,) = Session(exported(f'pruned-{keep_ratio}', model))(images)
    np.testing.assert_allclose(out, in_torch(model, images), rtol=0, atol=1e-4)


def test_a_search_is_not_exported() -> None:
    model = segmentor(backbone=dict(pruning=dict(search=True)))
    with pytest.raises(ValueError, match=r'model must be pruned .* got .* pruning\.search=True'):
        build_graph(model, HW)


@pytest.mark.slow
def test_a_head_that_follows_the_backbone(exported) -> None:
    model = segmentor(follow=True)
    images = noise(1)
    (out,) = Session(exported('follows', model))(images)
    np.testing.assert_allclose(out, in_torch(model, images), rtol=0, atol=1e-4)


@pytest.mark.parametrize('kind', ['Retina', pytest.param('ATSS', marks=pytest.mark.slow)])
def test_a_one_stage_head_in_kept_cells(exported, kind: str) -> None:
    model = detector(kind)
    session = Session(exported(kind, model, batch=None))
    for batch in (1, 2):
        images = noise(batch, seed=batch)
        outs = session(images)
        with torch.no_grad():
            expected = build_graph(model, HW)(torch.from_numpy(images))
        dropped = [np.isneginf(out).mean() for out in outs[5:7]]
        assert all(0 < share < 1 for share in dropped)
        for out, other in zip(outs, expected, strict=True):
            np.testing.assert_allclose(out, other, rtol=1e-3, atol=1e-3)


def test_the_mask_of_the_runtime_class_is_mmsegs(exported) -> None:
    model = segmentor()
    image = noise(1)[0].transpose(1, 2, 0).copy()
    logits = in_torch(model, noise(1))
    logits = torch.nn.functional.interpolate(logits, HW, mode='bilinear')
    expected = logits[0].argmax(0).numpy()
    mask = ExportedSegmentor(exported('dynamic', model, batch=None))(image)
    assert mask.dtype == np.uint8 and (mask == expected).mean() > 0.999
    in_graph = ExportedSegmentor(exported('argmax', model, argmax=True))
    assert (in_graph(image) == expected).mean() > 0.999
    # Of another size: resized into the exported one, and the mask back.
    large = image.repeat(2, 0).repeat(2, 1)
    assert in_graph(large).shape == (144, 176)
    assert (in_graph(large)[::2, ::2] == expected).mean() > 0.9
    assert in_graph(image[:40]).shape == (40, 88)
    assert in_graph(image, size=(10, 20)).shape == (10, 20)


def test_the_runtime_class_needs_no_torch(exported) -> None:
    path = exported('dynamic', segmentor(), batch=None)
    code = (
        'import sys, numpy as np\n'
        'from mmdynsparse.deployment import ExportedSegmentor\n'
        f'mask = ExportedSegmentor({str(path)!r}, threads=1)(np.zeros((72, 88, 3), np.uint8))\n'
        'assert mask.shape == (72, 88)\n'
        "assert not {'torch', 'mmseg', 'mmcv', 'mmengine'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, '-c', code], check=True)


def test_images_are_prepared_as_by_mmseg() -> None:
    """Padded as well; in an exported model equal locations, as of padding, may tie."""
    model, images = segmentor(divisor=32), torch.from_numpy(noise(2))
    data = model.data_preprocessor(dict(inputs=list(images), data_samples=[_Sample(), _Sample()]))
    graph = build_graph(model, HW, argmax=True)
    assert torch.equal(graph.images(images), data['inputs'])
    assert graph.images.padded_size == (96, 96) and describe(graph, None).padded_size == (96, 96)
    assert graph(images)[0].shape == (2, *HW)


@pytest.mark.slow
def test_one_logit_is_compared_with_the_threshold(exported) -> None:
    model = segmentor(classes=1)
    images = noise(1)
    probability = in_torch(model, images).sigmoid()
    file = exported('binary', model, argmax=False)
    metadata = Session(file).metadata
    assert metadata.threshold == pytest.approx(0.4)
    mask = ExportedSegmentor(file)(images[0].transpose(1, 2, 0).copy())
    assert set(np.unique(mask)) <= {0, 1}
    near = abs(float(mask.mean()) - float((probability > 0.4).float().mean()))
    assert near < 0.05


@pytest.mark.parametrize('corners', [False, True])
def test_resizing_is_torchs(corners: bool) -> None:
    logits = np.random.default_rng(0).standard_normal((7, 9, 5), np.float32)
    resized = _resize(logits, (20, 33), corners=corners)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(logits).permute(2, 0, 1)[None],
        (20, 33),
        mode='bilinear',
        align_corners=corners,
    )
    np.testing.assert_allclose(resized.transpose(2, 0, 1), expected[0], rtol=0, atol=1e-5)


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"selector must be 'topk' or .*got 'mass' in backbone"):
        build_graph(segmentor('mass'), HW)
    graph = build_graph(segmentor(), HW)
    metadata = describe(graph, None)
    assert metadata.classes == ['0', '1', '2']
    there = tmp_path / 'there.onnx'
    there.write_text('mine')
    with pytest.raises(ValueError, match='out must not exist yet'):
        export_model(graph, there, metadata)
    assert there.read_text() == 'mine'
    with pytest.raises(ValueError, match='opset must be at least 18, got 17'):
        export_model(graph, tmp_path / 'new.onnx', metadata, opset=17)
    with pytest.raises(ValueError, match=r"out must end in '.onnx'"):
        check_output(tmp_path / 'model.pth')
    with pytest.raises(ValueError, match='out must be in an existing folder'):
        check_output(tmp_path / 'nowhere/model.onnx')
    with pytest.raises(ValueError, match=r'got Loop, SequenceInsert, other::Add'):
        check_operators([('', 'Add'), ('', 'Loop'), ('', 'SequenceInsert'), ('other', 'Add')])
    with pytest.raises(ValueError, match='backend must be one of'):
        Session(there, 'tensorrt')
    with pytest.raises(ValueError, match=r"path must end in '.pt2' for aotinductor, got"):
        Session(there, 'aotinductor')
    with pytest.raises(ValueError, match=r"path must end in '.onnx' for openvino, got"):
        Session(tmp_path / 'model.pt2', 'openvino')
    with pytest.raises(ValueError, match='path must be an existing file'):
        Session(tmp_path / 'nowhere.onnx')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['there.onnx']


def test_a_missing_runtime_names_the_extra(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / 'model.onnx').write_text('')
    for backend, extra in (('onnxruntime', 'export'), ('openvino', 'openvino')):
        monkeypatch.setitem(sys.modules, backend, None)
        with pytest.raises(ValueError, match=rf'pip install mmdynsparse\[{extra}\]'):
            Session(tmp_path / 'model.onnx', backend)


def test_an_image_of_another_kind(exported) -> None:
    model = ExportedSegmentor(exported('dynamic', segmentor(), batch=None))
    for image in (np.zeros((72, 88), np.uint8), np.zeros((72, 88, 3), np.float32)):
        with pytest.raises(ValueError, match=r'image must be \(H, W, 3\) uint8, got'):
            model(image)
