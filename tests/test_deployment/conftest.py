"""A tiny segmentor and a tiny detector, and files of both."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from torch import nn

HW = (72, 88)


def _sparse(**kwargs) -> dict:
    return dict(
        type='mmdynsparse.SparseSwinTransformer',
        embed_dims=12,
        depths=(2, 1),
        num_heads=(1, 2),
        out_indices=(0, 1),
        window_size=7,
        **kwargs,
    )


def segmentor(
    selector: str = 'topk',
    classes: int = 3,
    follow: bool = False,
    divisor: int = 8,
    backbone: dict | None = None,
) -> nn.Module:
    init_default_scope('mmseg')
    torch.manual_seed(0)
    predictor = 'backbone' if follow else dict(type='mmdynsparse.CellPredictor')
    model = dict(
        type='EncoderDecoder',
        data_preprocessor=dict(
            type='SegDataPreProcessor',
            mean=[123.0, 116.0, 103.0],
            std=[58.0, 57.0, 55.0],
            bgr_to_rgb=True,
            test_cfg=dict(size_divisor=divisor),
        ),
        backbone=_sparse(
            **backbone
            or dict(sparsity=dict(locations={0: (0,), 1: (0,)}, keep_ratio=0.5, selector=selector))
        ),
        decode_head=dict(
            type='mmdynsparse.SparseUPerHead',
            in_channels=[12, 24],
            in_index=[0, 1],
            pool_scales=(1, 2),
            channels=16,
            num_classes=max(classes, 2),
            out_channels=classes,
            threshold=0.4 if classes == 1 else None,
            norm_cfg=dict(type='BN'),
            align_corners=False,
            loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=classes == 1),
            sparsity=dict(keep_ratio=0.4, predictor=predictor, cell_size=8),
        ),
        test_cfg=dict(mode='whole'),
    )
    model = MODELS.build(model)
    _randomize(model)
    return model.eval()


def detector(kind: str) -> nn.Module:
    """A RetinaNet or an ATSS whose head runs in kept cells."""
    init_default_scope('mmdet')
    torch.manual_seed(0)
    anchors = dict(type='AnchorGenerator', ratios=[1.0], octave_base_scale=4, scales_per_octave=1)
    norm = dict(norm_cfg=dict(type='GN', num_groups=4)) if kind == 'ATSS' else {}
    head = dict(
        type=f'mmdynsparse.Sparse{kind}Head',
        num_classes=3,
        in_channels=16,
        feat_channels=16,
        stacked_convs=2,
        anchor_generator=dict(anchors, strides=[8, 16, 32, 64, 128]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True),
        init_cfg=dict(type='Normal', layer='Conv2d', std=0.2),
        sparsity=dict(keep_ratio=[0.5, 0.4], cell_size=4),
        **norm,
    )
    model = dict(
        type='RetinaNet' if kind == 'Retina' else kind,
        data_preprocessor=dict(
            type='DetDataPreprocessor',
            mean=[123.0, 116.0, 103.0],
            std=[58.0, 57.0, 55.0],
            bgr_to_rgb=True,
        ),
        backbone=dict(type='ResNet', depth=18, base_channels=8, stem_channels=8),
        neck=dict(
            type='FPN',
            in_channels=[8, 16, 32, 64],
            out_channels=16,
            start_level=1,
            add_extra_convs='on_output',
            num_outs=5,
        ),
        bbox_head=head,
    )
    model = MODELS.build(model)
    model.init_weights()
    _randomize(model)
    return model.eval()


def _randomize(model: nn.Module) -> None:
    """Give norms statistics, and predictors clear preferences, as a training would."""
    for name, tensor in model.state_dict().items():
        if name.endswith('running_var'):
            tensor.copy_(torch.rand_like(tensor) + 0.5)
        elif name.endswith('running_mean'):
            tensor.copy_(torch.rand_like(tensor) - 0.5)
        elif 'predictor' in name and tensor.ndim > 1:
            tensor.copy_(torch.randn_like(tensor) * 0.5)


@pytest.fixture(autouse=True)
def own_scope() -> None:
    before = DefaultScope.get_current_instance()
    yield
    if before is not None:
        init_default_scope(before.scope_name)


@pytest.fixture(scope='session')
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Exports a model once for all tests and returns the file."""
    from mmdynsparse.deployment.export import describe, export_model
    from mmdynsparse.deployment.graph import build_graph

    folder, files = tmp_path_factory.mktemp('exported'), {}

    def export(
        name: str,
        model: nn.Module,
        argmax: bool = False,
        batch: int | None = 1,
        suffix: str = '.onnx',
    ) -> Path:
        if name not in files:
            files[name] = folder / f'{name}{suffix}'
            graph = build_graph(model, HW, argmax)
            meta = dict(classes=('a', 'b', 'c'), palette=[[0, 0, 0], [9, 9, 9], [7, 0, 7]])
            export_model(graph, files[name], describe(graph, meta), batch)
        return files[name]

    return export
