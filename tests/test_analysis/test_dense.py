from copy import deepcopy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmdynsparse.analysis.dense import _arguments, build_pair, dense_config

CONFIGS = Path(__file__).parents[2] / 'configs' / 'sparse_heads'
SWIN = dict(
    type='mmdynsparse.SparseSwinTransformer',
    embed_dims=12,
    depths=(1, 1, 2, 1),
    num_heads=(1, 2, 4, 8),
    sparsity=dict(keep_ratio=0.5),
)
VIT = dict(
    type='mmdynsparse.SparseVisionTransformer',
    embed_dims=16,
    num_layers=4,
    num_heads=2,
    out_indices=(1, 3),
    reactivate=True,
    sparsity=dict(keep_ratio=0.5),
)
CONVNEXT = dict(
    type='mmdynsparse.SparseConvNeXt',
    arch=dict(depths=(1, 1, 2, 1), channels=(8, 16, 24, 32)),
    out_indices=(0, 3),
    gap_before_final_norm=False,
    sparsity=dict(keep_ratio=0.5),
)


@pytest.fixture
def scope():
    """Function that sets the default scope, as the tools do."""
    yield init_default_scope
    init_default_scope('mmseg')


@pytest.mark.parametrize('library', ['mmseg', 'mmdet'])
def test_original_is_that_of_the_default_scope(library, scope):
    scope(library)
    model = dict(type='Anything', stages=[dict(backbone=SWIN)], neck=dict(type='FPN'))
    before = deepcopy(model)
    cfg, originals = dense_config(model)
    assert originals == [f'{library}.SwinTransformer']
    backbone = cfg['stages'][0]['backbone']
    assert backbone['type'] == 'SwinTransformer'
    assert set(backbone) == set(SWIN) - {'sparsity'}
    assert model == before
    assert MODELS.build(backbone).__module__.startswith(library)


@pytest.mark.parametrize('cfg', [SWIN, VIT, CONVNEXT], ids=lambda cfg: cfg['type'].split('.')[1])
def test_dense_model_has_the_weights_and_computes_the_sparse_model_that_keeps_all(cfg, scope):
    scope('mmseg')
    sparse, dense, originals = build_pair(cfg)
    sparse.set_keep_ratio(1.0)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for ours, original in zip(sparse(x), dense(x), strict=True):
            torch.testing.assert_close(ours, original, atol=1e-5, rtol=1e-4)
    weights = sparse.state_dict()
    for name, tensor in dense.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert not any('predictors' in name for name in dense.state_dict())
    assert not sparse.training and not dense.training
    if cfg is not CONVNEXT:
        assert originals[0].startswith('mmseg.')


def test_own_arguments_are_dropped(scope):
    scope('mmseg')
    assert 'reactivate' not in dense_config(VIT).model


def test_arguments_that_are_passed_on_are_arguments():
    from mmseg.models.backbones import ResNetV1c

    assert {'depth', 'norm_cfg', 'contract_dilation'} <= _arguments(ResNetV1c)


def test_ours_stands_in_where_the_original_is_not_installed(scope):
    scope('mmdet')  # it has no VisionTransformer
    cfg, originals = dense_config(VIT)
    assert cfg['type'] == VIT['type'] and 'sparsity' not in cfg
    assert originals == ['SparseVisionTransformer without sparsity (for VisionTransformer)']


def test_a_config_without_a_sparse_part(scope):
    scope('mmseg')
    cfg = Config(dict(model=dict(type='EncoderDecoder', backbone=dict(type='SwinTransformer'))))
    with pytest.raises(ValueError, match=r'sparse part.*got none among EncoderDecoder, SwinTrans'):
        dense_config(cfg.model)
    with pytest.raises(ValueError, match=r'with sparsity, got none among mmdynsparse.SparseSwin'):
        dense_config({**SWIN, 'sparsity': None})


def test_sparse_head_of_a_segmentor(scope):
    """Backbone and head are replaced, each by its original, with the same weights."""
    scope('mmseg')
    path = CONFIGS / 'sparse-swin-n_sparse-upernet_1xb8-2k_camvid-256x256.py'
    model = Config.fromfile(path).model
    sparse, dense, originals = build_pair(model)
    assert originals == ['mmseg.SwinTransformer', 'mmseg.UPerHead']
    assert type(dense.decode_head).__module__.startswith('mmseg.')
    sparse.backbone.set_keep_ratio(1.0)
    sparse.decode_head.decider.set_keep_ratio(1.0)
    sparse.decode_head.resolution = False
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(sparse(images), dense(images), atol=1e-4, rtol=1e-4)


def test_sparse_neck_and_head_of_a_detector(scope):
    scope('mmdet')
    path = CONFIGS / 'mask-rcnn_sparse-swin-n_sparse-fpn_1xb2-2k_camvid.py'
    cfg, originals = dense_config(Config.fromfile(path).model)
    assert originals == ['mmdet.SwinTransformer', 'mmdet.FPN', 'mmdet.RPNHead']
    assert 'sparsity' not in cfg['neck'] and 'sparsity' not in cfg['rpn_head']


@pytest.mark.parametrize(
    'path',
    [
        'sparse_resnet/mask-rcnn_sparse-r50-n_fpn_1xb2-2k_camvid.py',
        'sparse_heads/mask-rcnn_sparse-swin-n_sparse-fpn_1xb2-2k_camvid.py',
    ],
)
def test_regions_of_a_detector_see_the_dense_features(path, scope):
    """Down to mmcv's RoIAlign, which reads any map as if it were contiguous."""
    scope('mmdet')
    sparse, dense, _ = build_pair(Config.fromfile(CONFIGS.parent / path).model)
    for part in (sparse.backbone, getattr(sparse.neck, 'decider', None)):
        if part is not None:
            part.set_keep_ratio(1.0)
    images = torch.randn(2, 3, 128, 160)
    rois = torch.tensor([[0, 5.0, 7.0, 40.0, 60.0], [1, 0.0, 0.0, 159.0, 127.0]])
    with torch.no_grad():
        ours, original = (
            model.roi_head.bbox_roi_extractor(model.extract_feat(images)[:4], rois)
            for model in (sparse, dense)
        )
    torch.testing.assert_close(ours, original, atol=1e-4, rtol=1e-4)


def test_the_original_of_a_pruned_model_is_the_one_before_pruning(scope):
    scope('mmseg')
    pruning = dict(mixers=[['conv1'], ['none'], ['msa', 'msa'], ['msa']])
    cfg = {k: v for k, v in SWIN.items() if k != 'sparsity'} | dict(pruning=pruning)
    model = dict(type='Anything', backbone=cfg)
    dense, originals = dense_config(model)
    assert originals == ['mmseg.SwinTransformer']
    assert set(dense['backbone']) == set(cfg) - {'pruning'}
