"""Tiny segmentors and detectors of mmseg and mmdet, and batches for them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from mmengine.structures import InstanceData, PixelData

CONFIGS = Path(__file__).parents[1] / 'test_tools' / 'configs'
SCOPES = dict(seg='mmseg', det='mmdet')


@pytest.fixture(scope='session')
def tiny():
    """The functions below."""
    return SimpleNamespace(config=config, build=build, sample=sample, SCOPES=SCOPES)


def config(task, dense=False, changes=None, **backbone):
    """Return the config of the model, changed, without dropout and synchronised norms."""
    cfg = Config.fromfile(CONFIGS / f'{task}.py')
    cfg.merge_from_dict({f'model.{name}': value for name, value in (changes or {}).items()})
    cfg = cfg.model
    cfg.backbone.update(drop_path_rate=0.0, **backbone)
    if task == 'seg':
        cfg.decode_head.update(norm_cfg=dict(type='BN'), dropout_ratio=0.0)
    if dense:
        cfg.backbone.type = 'SwinTransformer'
        cfg.backbone.pop('sparsity')
    return cfg


def build(task, **kwargs):
    """Build the model under its library's scope."""
    DefaultScope._instance_dict.clear()
    init_default_scope(SCOPES[task])
    return MODELS.build(config(task, **kwargs))


def sample(task, index, size=(64, 64), ignored=0.25):
    """Return an image with its labels as a data loader gives them, the same for an index."""
    generator = torch.Generator().manual_seed(index)
    h, w = size
    image = torch.randint(0, 256, (3, h, w), generator=generator, dtype=torch.uint8)
    meta = dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0), img_id=index)
    if task == 'seg':
        from mmseg.structures import SegDataSample

        labels = torch.randint(0, 2, (1, h, w), generator=generator)
        labels[:, : round(ignored * h)] = 255
        data = SegDataSample(gt_sem_seg=PixelData(data=labels), metainfo=meta)
    else:
        from mmdet.structures import DetDataSample
        from mmdet.structures.mask import BitmapMasks

        boxes = torch.tensor([[4.0, 4.0, 40.0, 30.0], [20.0, 10.0, 60.0, 44.0]])
        masks = torch.zeros(2, h, w, dtype=torch.uint8).numpy()
        for mask, box in zip(masks, boxes.int().tolist(), strict=True):
            mask[box[1] : box[3], box[0] : box[2]] = 1
        instances = InstanceData(
            bboxes=boxes, labels=torch.zeros(2, dtype=torch.long), masks=BitmapMasks(masks, h, w)
        )
        data = DetDataSample(gt_instances=instances, metainfo=meta)
        data.ignored_instances = InstanceData(
            bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long)
        )
    return dict(inputs=image, data_samples=data)
