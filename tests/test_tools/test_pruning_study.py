"""benchmarks/pruning_study.py on tiny models."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmdynsparse.analysis import architecture_macs
from mmdynsparse.utils.checkpoints import Pruned, prune_state_dict

DENSE = """
model['backbone']['sparsity'] = None
param_scheduler = [dict(type='PolyLR', by_epoch=False, end=2)]
custom_hooks = []
"""
SEARCH = """
model['backbone']['pruning'] = dict(search=True)
optim_wrapper['constructor'] = 'mmdynsparse.FineTuneOptimWrapperConstructor'
custom_hooks = [dict(type='mmdynsparse.SinglePathSearchHook', target=0.7)]
"""
SPARSE = """
param_scheduler = [dict(type='PolyLR', by_epoch=False, end=2)]
custom_hooks = [dict(type='mmdynsparse.SparsityHook')]
"""


@pytest.fixture
def study(load_tool: Callable) -> ModuleType:
    return load_tool('../benchmarks/pruning_study.py')


@pytest.fixture
def args(write_config: Callable, tmp_path: Path) -> SimpleNamespace:
    """Configs of the three steps, a dense checkpoint and a folder for results."""
    configs = dict(
        search=write_config('seg', DENSE + SEARCH, name='study-search'),
        finetune=write_config('seg', DENSE, name='study-finetune'),
        sparse=write_config('seg', SPARSE, name='study-sparse'),
    )
    init_default_scope('mmseg')
    model = MODELS.build(Config.fromfile(configs['finetune']).model)
    for p in model.parameters():
        p.data.normal_(0, 0.2)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'dense.pth')
    return SimpleNamespace(**configs, start=tmp_path / 'dense.pth', out=tmp_path / 'out', iters=2)


def control(study: ModuleType, args: SimpleNamespace, name: str, seed: int = 0) -> Pruned:
    """What is pruned for a control of 0.7 of the dense multiply-adds."""
    path = args.out / 'control.pth'
    study.write_control(study.Variant(name, 0.7), args, seed, path)
    return prune_state_dict(torch.load(path)['state_dict'], alpha=100.0)


@pytest.mark.parametrize('name', ['uniform', 'random'])
def test_controls_cost_as_much(name: str, study: ModuleType, args: SimpleNamespace) -> None:
    """They have the dense weights; uniform ones have the units with the largest norms."""
    state, mixers, hidden = control(study, args, name)
    backbone, size = Config.fromfile(args.finetune).model.backbone, (64, 64)
    pruned = dict(backbone, pruning=dict(mixers=mixers, hidden=hidden))
    dense = architecture_macs(backbone, size)
    assert architecture_macs(pruned, size) == pytest.approx(0.7 * dense, rel=0.01)
    start = torch.load(args.start)['state_dict']
    key = 'backbone.stages.2.blocks.1.ffn.layers.{}.weight'
    first, rows = start[key.format('0.0')], state[key.format('0.0')]
    norms = first.norm(dim=1) * start[key.format(1)].norm(dim=0)
    kept = torch.stack([(first == row).all(1) for row in rows]).any(0)
    assert kept.sum() == len(rows) < len(first)
    is_uniform = {mixer for stage in mixers for mixer in stage} == {'msa'}
    is_uniform &= bool(norms[kept].min() > norms[~kept].max())
    assert is_uniform == (name == 'uniform')
    if is_uniform:
        widths = 48 * torch.tensor([1, 2, 4, 4, 8])
        shares = torch.tensor([units for stage in hidden for units in stage]) / widths
        assert shares.max() - shares.min() < 0.05


def test_random_controls_differ_by_seed(study: ModuleType, args: SimpleNamespace) -> None:
    first, again, other = (control(study, args, 'random', seed).hidden for seed in (0, 0, 1))
    assert first == again != other


def test_a_target_that_a_control_cannot_reach(study: ModuleType, args: SimpleNamespace) -> None:
    with pytest.raises(SystemExit, match=r'--targets must be within reach of random .* got 0.01'):
        study.write_control(study.Variant('random', 0.01), args, 0, args.out / 'control.pth')


@pytest.mark.slow
def test_runs_and_reports(study: ModuleType, args: SimpleNamespace, tmp_path: Path) -> None:
    common = [f'--{k}={getattr(args, k)}' for k in ('search', 'finetune', 'sparse', 'start', 'out')]
    names = ['dense-fine', 'searched-0.7', 'searched-sparse', 'uniform']
    study.main(['run', *common, '--targets', '0.7', '--iters', '2', '--variants', *names])
    report = tmp_path / 'report'
    study.main(['report', f'--out={report}', f'--study={args.out}'])
    rows = {row['variant']: row for row in json.loads((report / 'study.json').read_text())['rows']}
    assert rows.keys() == {'dense, fine-tuned', 'searched', 'searched, sparse', 'uniform'}
    for name in ('searched', 'uniform'):
        assert rows[name]['share'] == pytest.approx(0.7, rel=0.02)
        assert rows[name]['iters'] == 2 and 0 <= rows[name]['metrics']['mIoU'] <= 100
    found = rows['searched']['search']
    assert found['share'] == pytest.approx(rows['searched']['share'], rel=1e-4)
    assert rows['searched, sparse']['hidden'] == rows['searched']['hidden']
    text = (report / 'study.md').read_text()
    assert text.index('dense, fine-tuned') < text.index('searched') < text.index('uniform')


def test_bad_input(study: ModuleType, args: SimpleNamespace, capsys: pytest.CaptureFixture) -> None:
    files = [f'--{k}={getattr(args, k)}' for k in ('search', 'finetune', 'sparse', 'start', 'out')]
    for extra in (['--targets', '1'], ['--iters', '0'], ['--start', 'nowhere.pth']):
        with pytest.raises(SystemExit):
            study.main(['run', *files, *extra])
    with pytest.raises(SystemExit, match=r'--variants must be beginnings of dense.* got learnt'):
        study.main(['run', *files, '--variants', 'learnt'])
    with pytest.raises(SystemExit, match='--study must hold results'):
        study.main(['report', f'--out={args.out}', f'--study={args.out}'])
    errors = capsys.readouterr().err
    assert '--targets must be in (0, 1), got [1.0]' in errors
    assert '--iters must be at least 1, got 0' in errors
    assert '--start must be an existing file, got nowhere.pth' in errors
