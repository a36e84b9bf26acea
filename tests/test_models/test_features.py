"""Decisions that travel with the feature maps, from backbone to neck and head."""

from copy import deepcopy
from pathlib import Path
from runpy import run_path

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from torch.distributed.utils import _apply_to_tensors

from mmdynsparse.models.features import Features

TESTS = Path(__file__).parents[1]
BACKBONES = run_path(str(TESTS / 'test_models' / 'test_backbones' / 'test_all.py'))['BACKBONES']
TINY = run_path(str(TESTS / 'test_engine' / 'conftest.py'))
SIZE = (96, 128)
FOLLOWING = dict(keep_ratio=0.4, predictor='backbone')
RETINA_HEAD = dict(
    type='RetinaHead',
    num_classes=1,
    in_channels=16,
    stacked_convs=1,
    feat_channels=16,
    anchor_generator=dict(
        type='AnchorGenerator',
        octave_base_scale=4,
        scales_per_octave=1,
        ratios=[1.0],
        strides=[4, 8, 16, 32, 64],
    ),
    bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
    loss_cls=dict(type='FocalLoss', use_sigmoid=True),
    loss_bbox=dict(type='L1Loss'),
)


def config(task, detector='MaskRCNN'):
    """Config of a tiny model whose neck and heads follow its backbone."""
    cfg = TINY['config'](task)
    if task == 'seg':
        cfg.decode_head.update(type='mmdynsparse.SparseUPerHead', sparsity=FOLLOWING)
        return cfg
    cfg.neck.update(type='mmdynsparse.SparseFPN', sparsity=FOLLOWING)
    cfg.rpn_head.update(type='mmdynsparse.SparseRPNHead', sparsity=dict())
    cfg.type = detector
    if detector != 'MaskRCNN':
        del cfg.roi_head.mask_roi_extractor, cfg.roi_head.mask_head
    if detector == 'RetinaNet':
        del cfg.roi_head, cfg.rpn_head
        cfg.bbox_head = RETINA_HEAD
        cfg.train_cfg = dict(cfg.train_cfg.rpn, sampler=dict(type='PseudoSampler'))
        cfg.test_cfg = dict(cfg.test_cfg.rcnn, nms_pre=64, min_bbox_size=0)
    return cfg


def build(cfg, task):
    DefaultScope._instance_dict.clear()
    init_default_scope(TINY['SCOPES'][task])
    torch.manual_seed(0)
    model = MODELS.build(cfg)
    for name, p in model.named_parameters():
        if 'predictors' in name or 'decode_head' in name:
            p.data.add_(0.2 * torch.randn_like(p))
    return model.eval()


def batch(task, model, training):
    samples = [TINY['sample'](task, i, SIZE) for i in range(2)]
    data = {key: [sample[key] for sample in samples] for key in ('inputs', 'data_samples')}
    return model.data_preprocessor(data, training)


def total_loss(model, data):
    losses, _ = model.parse_losses(model.loss(data['inputs'], data['data_samples']))
    return losses


def decider_of(model):
    return model.decode_head.decider if hasattr(model, 'decode_head') else model.neck.decider


@pytest.mark.parametrize('name', BACKBONES)
def test_backbones_hand_on_their_decisions(name):
    """They come in the tuple of maps, which is a tuple like any other."""
    cfg = dict(BACKBONES[name], type=f'mmdynsparse.{name}')
    cfg['sparsity'] = cfg.get('sparsity', {}) | dict(keep_ratio=0.7)
    model = MODELS.build(cfg).eval()
    with torch.no_grad():
        outs = model(torch.randn(2, 3, 64, 96))
    assert isinstance(outs, Features) and len(outs) == 4
    assert len(outs.decisions) == 3
    assert all(one is other for one, other in zip(outs.decisions, model.decisions, strict=True))
    assert type(outs[1:]) is tuple
    twin = deepcopy(outs)
    assert torch.equal(twin[0], outs[0])
    assert torch.equal(twin.decisions[2].mask, outs.decisions[2].mask)
    cfg.pop('sparsity')
    assert MODELS.build(cfg).eval()(torch.randn(2, 3, 64, 96)).decisions == ()


@pytest.mark.parametrize('rebuild', [lambda x: x, lambda x: x.requires_grad_()])
def test_a_wrapper_may_rebuild_the_tuple(rebuild):
    """As sharded training does between the submodules that it wraps."""
    model = build(config('seg'), 'seg')
    with torch.no_grad():
        maps = model.backbone(torch.randn(2, 3, *SIZE))
        rebuilt = type(maps)(rebuild(x) for x in maps)
        assert rebuilt.decisions is maps.decisions and len(rebuilt) == 4
        assert _apply_to_tensors(rebuild, maps).decisions is maps.decisions
        assert torch.equal(model.decode_head(rebuilt), model.decode_head(maps))


MODEL_KINDS = [('seg', None), ('det', 'MaskRCNN'), ('det', 'FasterRCNN'), ('det', 'RetinaNet')]


@pytest.mark.parametrize(('task', 'detector'), MODEL_KINDS)
def test_whole_models(task, detector):
    """In training and at inference, masked and gathered, the cells are chosen by the backbone."""
    model = build(config(task, detector), task)
    decider, outs = decider_of(model), []
    data = batch(task, model, False)
    with torch.no_grad():
        for execution in ('masked', 'gather'):
            decider.execution = execution
            samples = model.predict(data['inputs'], deepcopy(data['data_samples']))
            (decision,) = decider.decisions
            (source,) = model.backbone.decisions
            means = source.scores.exp().logit().view(2, 1, 6, 8)
            means = torch.nn.functional.avg_pool2d(means, 2).flatten(1)
            best = means.topk(4, dim=1).indices.sort(1).values
            assert decision.mask.nonzero()[:, 1].view(2, 4).equal(best)
            if task == 'seg':
                outs.append(torch.stack([s.seg_logits.data for s in samples]))
            else:
                outs.append(torch.cat([s.pred_instances.scores for s in samples]))
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-4)
    model.train()
    total_loss(model, batch(task, model, True)).backward()
    assert decider.decisions[0].mask.detach().sum(1).tolist() == [4, 4]
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == []


@pytest.mark.parametrize('task', ['seg', 'det'])
def test_the_task_teaches_the_predictor_of_the_backbone(task):
    """Through the decision of the neck or head alone, if the maps carry no gradient."""
    model = build(config(task), task).train()
    data = batch(task, model, True)
    maps = model.backbone(data['inputs'])
    maps = Features([x.detach() for x in maps], maps.decisions)
    outs = model.neck(maps)[0] if task == 'det' else model.decode_head(maps)
    outs.square().mean().backward()
    for name, p in model.backbone.named_parameters():
        if 'predictors' in name:
            assert p.grad.abs().sum() > 0, name
    assert model.backbone.norm3.weight.grad is None


@pytest.mark.parametrize('task', ['seg', 'det'])
def test_a_backbone_that_keeps_everything_is_followed(task):
    """Its decision has no scores to choose by."""
    model = build(config(task), task)
    part = model.decode_head if task == 'seg' else model.neck
    model.backbone.set_keep_ratio(1.0)
    with torch.no_grad():
        maps = model.backbone(torch.randn(2, 3, *SIZE))
        outs = part(maps)
        assert part.decider.decisions[0].mask.mean() == 1
        part.decider.set_keep_ratio(1.0)
        expected = part(maps)
    for one, other in zip(outs, expected, strict=True):
        assert torch.equal(one, other)


def test_maps_without_decisions():
    """From a dense backbone, or a neck that makes new ones."""
    inputs = torch.randn(1, 3, *SIZE)
    for kind in ('mmdynsparse.SparseSwinTransformer', 'SwinTransformer'):
        cfg = config('seg')
        cfg.backbone.type = kind
        del cfg.backbone['sparsity']
        with pytest.raises(ValueError, match="predictor 'backbone' needs feature maps that carry"):
            build(cfg, 'seg')(inputs)
    cfg = config('seg')
    cfg.neck = dict(type='FPN', in_channels=[12, 24, 48, 96], out_channels=16, num_outs=4)
    cfg.decode_head.in_channels = [16] * 4
    with pytest.raises(ValueError, match='no neck in between that leaves them behind, got a tuple'):
        build(cfg, 'seg')(inputs)


def test_a_segmentor_is_one_graph():
    """Also with the decision of the backbone in the head."""
    model = build(config('seg'), 'seg')
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    with torch.no_grad():
        for size in (SIZE, (64, 160)):  # the second one is dynamic
            inputs = torch.randn(2, 3, *size)
            torch.testing.assert_close(compiled(inputs), model(inputs), atol=1e-4, rtol=1e-4)


def test_a_head_follows_in_an_exported_model_alone():
    """An exported program returns none but torch's types, so its own maps carry no decisions."""
    model, images = build(config('seg'), 'seg'), torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        exported = torch.export.export(model, (images,)).module()
        torch.testing.assert_close(exported(images), model(images), atol=1e-4, rtol=1e-4)
        maps = torch.export.export(model.backbone, (images,)).module()(images)
        assert type(maps) is tuple and not hasattr(maps[0], 'decisions')
        with pytest.raises(ValueError, match='needs feature maps that carry'):
            model.decode_head(maps)


@pytest.mark.parametrize('task', ['seg', 'det'])
def test_mixed_precision(task):
    """Without the heads of the detector: the NMS of mmcv takes no bfloat16 on the CPU."""
    model = build(config(task), task).train()
    data = batch(task, model, True)
    with torch.autocast('cpu', torch.bfloat16):
        if task == 'seg':
            loss = total_loss(model, data)
        else:
            loss = sum(x.square().mean() for x in model.neck(model.backbone(data['inputs'])))
    loss.backward()
    assert loss.isfinite()
    assert decider_of(model).decisions[0].mask.dtype == torch.float32
    grads = [p.grad for name, p in model.named_parameters() if 'predictors' in name]
    assert all(grad.isfinite().all() for grad in grads)
