"""Sparse RoI heads against mmdet's, in whole detectors."""

import multiprocessing as mp
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip('mmdet')
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks

from mmdynsparse.analysis.dense import build_pair
from mmdynsparse.analysis.flops import count_macs
from mmdynsparse.analysis.images import image_batch
from mmdynsparse.models.budgets import add_budgets, set_budget
from mmdynsparse.models.decider import deciders
from mmdynsparse.visualization import keep_map_row
from mmdynsparse.visualization.keep_maps import GAP, LABEL_HEIGHT

STANDARD = 'configs/sparse_swin/mask-rcnn_swin-n_fpn_1xb2-2k_camvid.py'
META = dict(
    img_shape=(96, 128),
    pad_shape=(96, 128),
    ori_shape=(96, 128),
    batch_input_shape=(96, 128),
    scale_factor=(1.0, 1.0),
)


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')


def model_cfg(cascade=False, mask=True, proposals=0.3, regions=0.5):
    """A small detector with sparse RoI heads."""
    cfg = Config.fromfile(STANDARD).model
    cfg.backbone.update(embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
    cfg.neck.update(in_channels=[8, 16, 32, 64], out_channels=16)
    cfg.rpn_head.update(in_channels=16, feat_channels=16)
    roi = cfg.roi_head
    roi.update(type='mmdynsparse.SparseStandardRoIHead', sparsity=dict(keep_ratio=proposals))
    for extractor in (roi.bbox_roi_extractor, roi.mask_roi_extractor):
        extractor.out_channels = 16
    roi.bbox_head.update(in_channels=16, fc_out_channels=32)
    roi.mask_head.update(type='mmdynsparse.SparseFCNMaskHead', in_channels=16, conv_out_channels=16)
    roi.mask_head.sparsity = dict(keep_ratio=regions)
    if cascade:
        roi.update(type='mmdynsparse.SparseCascadeRoIHead', num_stages=2)
        roi.stage_loss_weights = [1, 0.5]
        roi.bbox_head = [deepcopy(roi.bbox_head) for _ in range(2)]
        for head in roi.bbox_head:
            head.reg_class_agnostic = True
        cfg.train_cfg.rcnn = [deepcopy(cfg.train_cfg.rcnn) for _ in range(2)]
    if not mask:
        del roi['mask_head'], roi['mask_roi_extractor']
    cfg.test_cfg.rcnn.update(score_thr=0.0, max_per_img=20)
    return cfg


def samples(objects=(1, 2)):
    torch.manual_seed(0)
    out = []
    for n in objects:
        sample = DetDataSample(metainfo=META)
        corner = torch.rand(n, 2) * torch.tensor([80.0, 50.0])
        masks = BitmapMasks(torch.ones(n, 96, 128).numpy().astype('uint8'), 96, 128)
        sample.gt_instances = InstanceData(
            bboxes=torch.cat([corner, corner + 40], 1), labels=torch.zeros(n).long(), masks=masks
        )
        sample.ignored_instances = InstanceData(
            bboxes=torch.zeros(0, 4), labels=torch.zeros(0).long()
        )
        out.append(sample)
    return out


def inputs():
    return torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def results(model, **decider):
    for part in deciders(model).values():
        for name, value in decider.items():
            setattr(part, name, value)
    return [s.pred_instances for s in model.predict(inputs(), samples(), rescale=False)]


def same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert set(one.keys()) == set(other.keys())
        for key in one.keys():  # noqa: SIM118
            torch.testing.assert_close(one[key], other[key], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('mask', [True, False])
@pytest.mark.parametrize('cascade', [False, True])
def test_everything_kept_is_mmdet(cascade, mask):
    pair = build_pair(model_cfg(cascade, mask, 1.0, 1.0))
    assert set(pair.sparse.state_dict()) == set(pair.dense.state_dict())
    kind = type(pair.dense.roi_head)
    assert kind.__module__.startswith('mmdet') and f'mmdet.{kind.__name__}' in pair.originals
    same(results(pair.sparse), results(pair.dense))


@pytest.mark.parametrize('mask', [True, False])
@pytest.mark.parametrize('cascade', [False, True])
def test_kept_proposals_alone_are_looked_at(cascade, mask):
    """As mmdet's model that gets no more proposals."""
    pair = build_pair(model_cfg(cascade, mask, 0.3, 1.0))
    found = results(pair.sparse)
    with torch.no_grad():
        x = pair.dense.extract_feat(inputs())
        proposals = pair.dense.rpn_head.predict(x, samples(), rescale=False)
        best = [p[: int(0.3 * len(p))] for p in proposals]
        expected = pair.dense.roi_head.predict(x, best, samples(), rescale=False)
    same(found, expected)
    (decision,) = pair.sparse.roi_head.decider.decisions
    assert decision.mask.shape == (1, sum(map(len, proposals)))
    assert decision.mask.sum() == sum(map(len, best)) > 0


@pytest.mark.parametrize('cascade', [False, True])
def test_executions_agree(cascade):
    torch.manual_seed(0)
    model = MODELS.build(model_cfg(cascade)).eval()
    gathered = results(model)
    same(results(model, execution='masked'), gathered)
    rates = {name: d.decisions[0].mask.mean() for name, d in deciders(model).items()}
    masks = [f'roi_head.mask_head.{i}' for i in range(2)] if cascade else ['roi_head.mask_head']
    assert set(rates) == {'roi_head', *masks}
    assert 0.25 < rates['roi_head'] <= 0.3 and all(rates[name] == 0.5 for name in masks)


@pytest.mark.parametrize('cascade', [False, True])
def test_fewer_multiply_adds(cascade):
    pair = build_pair(model_cfg(cascade))
    x = [torch.randn(1, 16, 24 >> i, 32 >> i) for i in range(4)]
    boxes = torch.rand(50, 4) * 30
    boxes[:, 2:] += boxes[:, :2] + 8
    proposals = [InstanceData(bboxes=boxes, scores=torch.rand(50), labels=torch.zeros(50).long())]

    def macs(model):
        return count_macs(lambda: model.roi_head.predict(x, deepcopy(proposals), samples()[:1]))

    dense = macs(pair.dense)
    assert macs(pair.sparse) < 0.7 * dense
    set_budget(pair.sparse, 1.0)
    # The masks of other classes than the own one are not computed.
    assert 0.9 * dense < macs(pair.sparse) <= dense


@torch.no_grad()
@pytest.mark.parametrize('cascade', [False, True])
def test_a_picture_shows_what_kept_proposals_cover(cascade):
    model = MODELS.build(model_cfg(cascade, proposals=0.02)).eval()
    batch = image_batch(1, (96, 128), 'mmdet')
    model.test_step(batch)
    panels = keep_map_row(model, batch)[LABEL_HEIGHT:]
    image, shown = panels[:, :128], panels[:, 128 + GAP :]
    covered = np.zeros((96, 128), bool)
    for x1, y1, x2, y2 in model.roi_head.kept_boxes[0].round().int().tolist():
        covered[y1:y2, x1:x2] = True
    assert 0 < covered.sum() < covered.size
    assert (shown == image).all(-1)[covered].all()
    assert (shown != image).any(-1)[~covered].mean() > 0.9


def test_budgets():
    model = MODELS.build(model_cfg())
    add_budgets(model, {'0.6': {'roi_head': [0.2], 'roi_head.mask_head': [0.4]}})
    set_budget(model, '0.6')
    assert model.roi_head.decider.keep_ratios == [0.2]
    assert model.roi_head.mask_head.decider.keep_ratios == [0.4]


@pytest.mark.parametrize('objects', [(1, 2), (0, 2), (0, 0)])
@pytest.mark.parametrize('cascade', [False, True])
def test_training_is_that_of_mmdet(cascade, objects):
    """All proposals take part; masks of both paths are learned; nothing is NaN."""
    pair = build_pair(model_cfg(cascade, True, 0.3, 1.0))
    losses = []
    for model in (pair.sparse.train(), pair.dense.train()):
        torch.manual_seed(0)
        loss = model.loss(inputs(), samples(objects))
        losses.append(
            {
                name: torch.as_tensor(value[0] if isinstance(value, list) else value)
                for name, value in loss.items()
            }
        )
    torch.testing.assert_close(*losses)
    for decider in deciders(pair.sparse).values():
        decider.set_keep_ratio(0.5)
    loss, _ = pair.sparse.parse_losses(pair.sparse.loss(inputs(), samples(objects)))
    assert loss.isfinite()
    loss.backward()
    grads = [p.grad for p in pair.sparse.roi_head.parameters()]
    assert all(g is not None and g.isfinite().all() for g in grads)


def all_parts(cascade):
    """A small detector of which everything is sparse, in training mode."""
    cfg = model_cfg(cascade)
    cfg.backbone.update(type='mmdynsparse.SparseSwinTransformer', depths=(1, 1, 3, 1))
    cfg.backbone.sparsity = dict(keep_ratio=0.7, locations={2: [1]})
    cfg.neck.update(type='mmdynsparse.SparseFPN', sparsity=dict(keep_ratio=0.5))
    cfg.rpn_head.update(type='mmdynsparse.SparseRPNHead', sparsity=dict())
    model = MODELS.build(cfg).train()
    for decider in deciders(model).values():
        decider.has_ratio_loss = True
    return model


def step(model, data):
    losses = model(inputs=inputs(), data_samples=data, mode='loss')
    bare = getattr(model, 'module', model)
    masks = [d.mask.mean() for part in (bare.backbone, bare.neck) for d in part.decider.decisions]
    loss, _ = bare.parse_losses(losses | dict(loss_keep_ratio=sum(masks)))
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in bare.named_parameters() if p.requires_grad}


def worker(rank, model, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', f'file://{folder}/init', rank=rank, world_size=2)
    wrapped = DistributedDataParallel(model)
    # The second process sees no objects; parameters that DDP finds unused raise in the second step.
    for _ in range(2):
        grads = step(wrapped, samples((1, 2) if rank == 0 else (0, 0)))
    torch.save(grads, folder / f'{rank}.pth')
    dist.destroy_process_group()


@pytest.mark.parametrize('cascade', [False, True])
def test_two_processes(cascade, tmp_path):
    """All parameters get the same gradient in both, also where an image has no objects."""
    model = all_parts(cascade)
    context = mp.get_context('fork')
    processes = [context.Process(target=worker, args=(rank, model, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / f'{rank}.pth') for rank in range(2))
    assert all(grad is not None and grad.isfinite().all() for grad in first.values())
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize('cascade', [False, True])
def test_training_in_bf16(cascade):
    """Neither NMS nor RoIAlign of mmcv take it, so stock detectors do not train so."""
    with torch.autocast('cpu', torch.bfloat16):
        grads = step(all_parts(cascade), samples())
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())


@torch.no_grad()
@pytest.mark.parametrize('mask', [True, False])
@pytest.mark.parametrize('cascade', [False, True])
@pytest.mark.parametrize('counts', [(0, 0), (0, 5)])
def test_no_proposals(cascade, mask, counts):
    pair = build_pair(model_cfg(cascade, mask))
    x = [torch.randn(2, 16, 24 >> i, 32 >> i) for i in range(4)]
    boxes = torch.tensor([[4.0, 4.0, 30.0, 40.0]])
    proposals = [
        InstanceData(bboxes=boxes.repeat(n, 1), scores=torch.rand(n), labels=torch.zeros(n).long())
        for n in counts
    ]
    found = pair.sparse.roi_head.predict(x, proposals, samples(), rescale=False)
    expected = pair.dense.roi_head.predict(x, proposals, samples(), rescale=False)
    assert len(found[0]) == 0 and set(found[0].keys()) == set(expected[0].keys())
    assert (len(found[1]) > 0) == (counts[1] > 0)
    assert all(v.isfinite().all() for r in found for v in r.values() if v.is_floating_point())


def test_proposals_without_scores():
    model = MODELS.build(model_cfg()).eval()
    proposals = [InstanceData(bboxes=torch.rand(3, 4))]
    with pytest.raises(ValueError, match='needs proposals with scores'):
        model.roi_head.predict([torch.zeros(1, 16, 8, 8)] * 4, proposals, samples()[:1])


@torch.no_grad()
@pytest.mark.parametrize('cascade', [False, True])
def test_raw_outputs(cascade):
    model = MODELS.build(model_cfg(cascade)).eval()
    out = model(inputs(), samples(), mode='tensor')
    assert len(out[0]) == 3


@pytest.mark.parametrize('cascade', [False, True])
def test_roi_align_has_the_values_of_mmcv(cascade):
    pair = build_pair(model_cfg(cascade))
    x = [torch.randn(1, 16, 24 >> i, 32 >> i) for i in range(4)]
    rois = torch.tensor([[0, 3.0, 2, 40, 80], [0, 60, 0, 127, 95], [0, 5, 5, 5, 5]])
    ours, mmcv = ([*m.roi_head.modules()] for m in pair[:2])
    extractors = [[m for m in part if hasattr(m, 'roi_layers')] for part in (ours, mmcv)]
    assert len(extractors[0]) == (4 if cascade else 2)
    for own, dense in zip(*extractors, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(own(x, rois), dense(x, rois), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(own(x, rois), dense(x, rois), atol=0, rtol=0)
