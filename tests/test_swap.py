"""The swap: stock configs train with the backbone's type changed, in a fresh process.

So does our detector with a vision transformer, of which mmdet ships none. The process imports
nothing of mmdynsparse by itself, and one of mmseg and mmdet may be absent.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[1] / 'configs'
# Configs and the number of blocks in the third stage of their backbone, in the only one of ViT.
SWIN = 'mmseg/.mim/configs/swin/swin-{}-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'
UPERNET = {
    SWIN.format('tiny'): 6,
    SWIN.format('small'): 18,
    SWIN.format('base'): 18,
    'mmseg/.mim/configs/upernet/upernet_r50_4xb4-160k_ade20k-512x512.py': 6,
}
MASK_RCNN = {
    'mmdet/.mim/configs/swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py': 6,
    'mmdet/.mim/configs/mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py': 6,
    str(CONFIGS / 'sparse_vit' / 'mask-rcnn_sparse-vit-n_sfp_1xb2-2k_camvid.py'): 12,
}
BLOCKS = UPERNET | MASK_RCNN
ONE_EACH = [next(iter(UPERNET)), next(iter(MASK_RCNN))]

SCRIPT = """
import json
import re
import sys

absent, work_dir, *files = sys.argv[1:]


class Without:
    # A finder that does not see one package.

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == absent:
            return None
        return self.finder.find_spec(name, path, target)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.runner import Runner
from torch.utils.data import DataLoader

SIZE = 64


def seg_sample():
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    sample = SegDataSample(metainfo=dict(img_shape=(SIZE, SIZE)))
    sample.gt_sem_seg = PixelData(data=torch.randint(0, 19, (1, SIZE, SIZE)))
    return sample


def det_sample():
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    mask = np.zeros((1, SIZE, SIZE), dtype=np.uint8)
    mask[:, 8:40, 8:40] = 1
    shape = dict(img_shape=(SIZE, SIZE), ori_shape=(SIZE, SIZE))
    sample = DetDataSample(metainfo=shape)
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor([[8.0, 8.0, 40.0, 40.0]]),
        labels=torch.tensor([3]),
        masks=BitmapMasks(mask, SIZE, SIZE),
    )
    return sample


def batches(make_sample):
    image = torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8)
    samples = [dict(inputs=image, data_samples=make_sample()) for _ in range(2)]
    return DataLoader(samples, batch_size=2, collate_fn=pseudo_collate)


def train_one_iteration(file):
    cfg = Config.fromfile(file)
    if not cfg.model.backbone.type.startswith('mmdynsparse.'):
        cfg.model.backbone.type = 'mmdynsparse.Sparse' + cfg.model.backbone.type
    cfg.model.backbone.sparsity = dict(keep_ratio=0.7)
    cells = dict(keep_ratio=0.5, predictor=dict(type='mmdynsparse.CellPredictor'))
    if 'decode_head' in cfg.model:
        heads = dict(decode_head=cells)
    elif cfg.model.neck.type == 'FPN':
        heads = dict(neck=cells, rpn_head={})
    else:
        heads = dict(rpn_head=cells)
    for part, sparsity in heads.items():
        cfg.model[part].type = 'mmdynsparse.Sparse' + cfg.model[part].type
        cfg.model[part].sparsity = sparsity
    cfg.custom_hooks = [dict(type='mmdynsparse.SparsityHook', weight=10.0)]
    # No download in a test.
    cfg.model.pop('pretrained', None)
    cfg.model.backbone.pop('init_cfg', None)
    # SGD adds it to the gradients, which the momentum is to show.
    cfg.optim_wrapper.optimizer.weight_decay = 0.0
    if cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = (SIZE, SIZE)
    torch.manual_seed(0)
    runner = Runner(
        model=cfg.model,
        work_dir=work_dir,
        train_dataloader=batches(seg_sample if cfg.default_scope == 'mmseg' else det_sample),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=1),
        optim_wrapper=cfg.optim_wrapper,
        default_hooks=dict(checkpoint=None),
        custom_hooks=cfg.custom_hooks,
        default_scope=cfg.default_scope,
        experiment_name=file.rsplit('/', 1)[-1],
    )
    runner.train()
    logged = runner.message_hub.log_scalars
    state = runner.optim_wrapper.optimizer.state
    moment = 'momentum_buffer' if cfg.optim_wrapper.optimizer.type == 'SGD' else 'exp_avg'
    moved = [
        bool(state[parameter][moment].abs().sum() > 0)
        for name, parameter in runner.model.named_parameters()
        if re.search(r'predictors?[.].*weight$', name)
    ]
    stages = getattr(runner.model.backbone, 'stages', None)
    stage = stages[2] if stages else runner.model.backbone.layers
    return dict(
        backbone=type(runner.model.backbone).__name__,
        heads=[type(getattr(runner.model, part)).__name__ for part in heads],
        blocks=len(getattr(stage, 'blocks', stage)),
        decisions=len(runner.model.backbone.decisions),
        losses={
            key.removeprefix('train/'): float(value.current())
            for key, value in logged.items()
            if 'loss' in key
        },
        predictors_learn=bool(moved) and all(moved),
    )


loaded_early = 'mmdynsparse' in sys.modules
results = [train_one_iteration(file) for file in files]
report = dict(
    loaded_early=loaded_early, imported=[name in sys.modules for name in ('mmseg', 'mmdet')]
)
print('REPORT' + json.dumps(dict(report, results=results)))
"""


def run_swap(absent, files, tmp_path):
    """Train one iteration of every stock config in a fresh process and return its report."""
    site = Path(importlib.util.find_spec('mmseg').origin).parents[1]
    det_site = Path(importlib.util.find_spec('mmdet').origin).parents[1]
    paths = [str((site if file.startswith('mmseg') else det_site) / file) for file in files]
    command = [sys.executable, '-c', SCRIPT, absent, str(tmp_path), *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('REPORT')]
    return json.loads(line.removeprefix('REPORT'))


@pytest.mark.parametrize(
    ('absent', 'files', 'imported'),
    [
        ('mmdet', list(UPERNET), [True, False]),
        ('mmseg', list(MASK_RCNN), [False, True]),
        ('nothing', ONE_EACH, [True, True]),
    ],
    ids=['mmdet absent', 'mmseg absent', 'both installed'],
)
def test_stock_config_trains_with_the_type_changed(absent, files, imported, tmp_path):
    report = run_swap(absent, files, tmp_path)
    assert not report['loaded_early']
    assert report['imported'] == imported
    for file, result in zip(files, report['results'], strict=True):
        resnet = 'SparseResNetV1c' if 'upernet' in file else 'SparseResNet'
        families = dict(swin='SparseSwinTransformer', vit='SparseVisionTransformer', r50=resnet)
        (family,) = [name for name in families if name in Path(file).stem]
        assert result['backbone'] == families[family]
        heads = ['SparseUPerHead'] if 'upernet' in file else ['SparseFPN', 'SparseRPNHead']
        assert result['heads'] == (heads[1:] if 'sfp' in file else heads)
        assert result['blocks'] == BLOCKS[file]
        assert result['decisions'] == 3
        losses = result['losses']
        task_loss = 'loss_mask' if 'mask-rcnn' in file else 'decode.loss_ce'
        assert {'loss', 'loss_keep_ratio', task_loss} <= set(losses)
        assert all(0.0 <= value < 1e4 for value in losses.values())
        assert losses['loss'] > losses[task_loss]
        assert result['predictors_learn']
