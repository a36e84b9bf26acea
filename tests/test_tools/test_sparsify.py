"""tools/sparsify.py on tiny models."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmdynsparse.models.decider import keep_ratios

TOOL = 'sparsify.py'
# The configs are of sparse backbones.
DENSE = """
model['backbone'].update(type='SwinTransformer')
del model['backbone']['sparsity']
custom_hooks = []
"""
PLAIN_NORMS = "model['decode_head']['norm_cfg'] = dict(type='BN')\n"
# The lazy style: types are classes, and there is no scope.
LAZY = """
from mmengine.optim.scheduler import PolyLR
from mmdet.models.backbones import SwinTransformer

from mmdet.models.detectors import MaskRCNN

param_scheduler = [dict(type=PolyLR, by_epoch=True, begin=0, end=2)]
model.update(type=MaskRCNN)
model['backbone'].update(type=SwinTransformer)
default_scope = None
custom_imports = None
"""
FAST = ('--rounds', '0', '--size', '64')


@pytest.fixture
def dense_config(write_config: Callable) -> Callable[[str], Path]:
    """Writes the dense form of a tiny config: ``dense_config('seg')``."""

    def write(task: str, extra: str = '', name: str = 'dense') -> Path:
        norms = PLAIN_NORMS if task == 'seg' else ''
        return write_config(task, DENSE + norms + extra, name=f'{name}_{task}')

    return write


def sparsify(load_tool: Callable, *args: object) -> Config:
    """Run the tool and read what it wrote, the argument after '-o'."""
    args = list(map(str, args))
    load_tool(TOOL).main([*args, *FAST])
    return Config.fromfile(args[args.index('-o') + 1])


@pytest.mark.parametrize('task', ['seg', 'det'])
def test_trains_and_tests(
    task: str, load_tool: Callable, dense_config: Callable, run_tool: Callable, tmp_path: Path
) -> None:
    """Dense config and checkpoint, sparsify, train, test: no file is edited by hand."""
    config = dense_config(task)
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    torch.save(MODELS.build(cfg.model).state_dict(), tmp_path / 'dense.pth')
    out = tmp_path / 'sparse.py'
    sparse = sparsify(load_tool, config, tmp_path / 'dense.pth', '-o', out)
    assert sparse.model.backbone.type == 'mmdynsparse.SparseSwinTransformer'
    assert sparse.load_from == str(tmp_path / 'dense.pth')
    assert len(out.read_text().splitlines()) < 50
    run_tool('train.py', out, '--work-dir', tmp_path / 'run')
    checkpoint = next((tmp_path / 'run').glob('*_1.pth'))
    run_tool('test.py', out, checkpoint, '--work-dir', tmp_path / 'run')


def test_no_training(
    load_tool: Callable, dense_config: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    args = (dense_config('seg'), '-o', tmp_path / 'sparse.py', '--no-training')
    cfg = sparsify(load_tool, *args)
    assert 'sparsity' not in cfg.model.backbone
    assert cfg.model.decode_head.sparsity == dict(keep_ratio=0.3)
    assert not cfg.custom_hooks
    init_default_scope('mmseg')
    model = MODELS.build(cfg.model)
    dense = MODELS.build(Config.fromfile(args[0]).model)
    assert set(model.state_dict()) == set(dense.state_dict())
    out = capsys.readouterr().out
    assert 'tools/test.py' in out and 'DENSE_CHECKPOINT' in out
    # Of a detector all but the neck goes without training.
    cfg = sparsify(load_tool, dense_config('det'), '-o', tmp_path / 'det.py', '--no-training')
    assert cfg.model.neck.type == 'FPN'
    assert cfg.model.rpn_head.type == 'mmdynsparse.SparseRPNHead'
    assert 'sparsity' not in cfg.model.rpn_head  # its faster NMS alone
    assert cfg.model.roi_head.type == 'mmdynsparse.SparseStandardRoIHead'
    assert cfg.model.roi_head.sparsity == dict(keep_ratio=0.3)
    assert cfg.model.roi_head.mask_head.type == 'mmdynsparse.SparseFCNMaskHead'
    assert 'its sparsity has to be trained' in capsys.readouterr().out


def test_parts(load_tool: Callable, dense_config: Callable, tmp_path: Path) -> None:
    cfg = sparsify(load_tool, dense_config('seg'), '-o', tmp_path / 'x.py', '--parts', 'head')
    assert cfg.model.backbone.type == 'SwinTransformer'
    assert cfg.model.decode_head.type == 'mmdynsparse.SparseUPerHead'
    assert not cfg.get('custom_hooks')  # by entropy, it has nothing to learn
    cfg = sparsify(load_tool, dense_config('det'), '-o', tmp_path / 'y.py', '--parts', 'neck')
    assert cfg.model.neck.type == 'mmdynsparse.SparseFPN'
    # The backbone is not sparse, so its features have nothing to learn.
    assert (
        cfg.custom_hooks[1].features == dict(neck=0.5) and cfg.custom_hooks[1].logit_weight == 5.0
    )


def test_budget(
    load_tool: Callable, fails: Callable, dense_config: Callable, tmp_path: Path
) -> None:
    config = dense_config('seg')
    line = fails(TOOL, config, '-o', tmp_path / 'x.py', '--budget', '0.01', *FAST)
    lowest = float(re.search(r'--budget must be at least (0\.\d+),.*got 0.01', line)[1])
    kept = {}
    for budget in (round(lowest + 0.05, 2), 1):
        args = (config, '-o', tmp_path / f'{budget}.py', '--budget', budget)
        init_default_scope('mmseg')
        kept[budget] = sum(keep_ratios(MODELS.build(sparsify(load_tool, *args).model)))
    low, high = kept.values()
    assert low < high == 2  # one decision of the backbone, one of the head
    assert not (tmp_path / 'x.py').exists()


def test_every_budget(load_tool: Callable, dense_config: Callable, tmp_path: Path) -> None:
    cfg = sparsify(load_tool, dense_config('seg'), '-o', tmp_path / 'x.py', '--budget', 'all')
    assert cfg.custom_hooks[0].type == 'mmdynsparse.DenseSparseSchedule'
    assert cfg.custom_hooks[2].logit_weight == 5.0  # the head is sparse too
    assert cfg.model.backbone.sparsity.selector == 'sampled'
    assert 'selector' not in cfg.model.decode_head.sparsity  # by entropy, which does not sample


def test_lazy_style(load_tool: Callable, dense_config: Callable, tmp_path: Path) -> None:
    config = dense_config('det', LAZY, name='lazy')
    out = config.parent / 'lazy_sparse.py'
    cfg = sparsify(load_tool, config, '-o', out)
    assert 'with read_base():' in out.read_text() and '_base_' not in out.read_text()
    assert cfg.default_scope == 'mmdet'
    assert cfg.model.backbone.type == 'mmdynsparse.SparseSwinTransformer'
    assert cfg.model.neck.sparsity == dict(keep_ratio=0.6)
    init_default_scope('mmdet')
    model = MODELS.build(cfg.model)
    assert len(keep_ratios(model)) == 4  # backbone, neck, proposals, masks


def test_inherits_from_several_bases(
    load_tool: Callable, dense_config: Callable, tmp_path: Path
) -> None:
    """What two bases of mmengine may not share, a child may change."""
    hooks = "custom_hooks = [dict(type='CheckInvalidLossHook', interval=7)]\n"
    config = dense_config('seg', 'optim_wrapper["paramwise_cfg"] = None\n' + hooks)
    cfg = sparsify(load_tool, config, '-o', tmp_path / 'x.py')
    assert cfg.custom_hooks[0] == dict(type='CheckInvalidLossHook', interval=7)
    assert cfg.optim_wrapper.paramwise_cfg == dict(pretrained_lr_mult=0.2)


def test_bad_input(fails: Callable, write_config: Callable, tmp_path: Path) -> None:
    config = write_config('seg', DENSE, name='dense')
    out = tmp_path / 'x.py'
    no_model = tmp_path / 'no_model.py'
    no_model.write_text('a = 1\n')
    assert 'config must have a model' in fails(TOOL, no_model, '-o', out)
    assert 'must be an existing file' in fails(TOOL, tmp_path / 'none.py', '-o', out)
    other = write_config('seg', DENSE + "model['backbone']['type'] = 'UNet'\n", name='unet')
    assert 'stays: no sparse counterpart' in fails(
        TOOL, other, '-o', out, '--parts', 'backbone', *FAST
    )
    out.write_text('mine')
    assert 'which exists' in fails(TOOL, config, '-o', out)
    assert out.read_text() == 'mine'
    new = tmp_path / 'new.py'
    assert "--budget must be in (0, 1] or 'all'" in fails(TOOL, config, '-o', new, '--budget', '2')
    assert 'existing checkpoint' in fails(TOOL, config, 'none.pth', '-o', new, *FAST)
    line = fails(TOOL, config, '-o', new, '--no-training', '--length', '9', *FAST)
    assert '--length must not be given with --no-training, got 9' in line
    assert not new.exists()
