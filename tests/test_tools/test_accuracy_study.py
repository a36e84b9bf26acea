"""benchmarks/accuracy_study.py."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

SCHEDULE = """
param_scheduler = [dict(type='PolyLR', by_epoch=False, end=2)]
optim_wrapper['constructor'] = 'mmdynsparse.FineTuneOptimWrapperConstructor'
optim_wrapper['paramwise_cfg'] = dict(pretrained_lr_mult=0.2)
custom_hooks = [
    dict(type='mmdynsparse.SparsityHook', weight=10.0),
    dict(type='mmdynsparse.DistillationHook'),
]
"""


@pytest.fixture
def study(load_tool: Callable) -> ModuleType:
    return load_tool('../benchmarks/accuracy_study.py')


@pytest.fixture
def config(write_config: Callable) -> Path:
    return write_config('seg', SCHEDULE, name='study')


def sparse(study: ModuleType, config: Path, name: str, ratio: float) -> Config:
    return study.as_sparse(Config.fromfile(config), study.Variant(name, ratio))


def test_variants_differ_in_what_their_names_say(study: ModuleType, config: Path) -> None:
    learned = sparse(study, config, 'learned', 0.6)
    assert learned.model.backbone.sparsity.keep_ratio == 0.6
    assert learned.custom_hooks == Config.fromfile(config).custom_hooks
    control = sparse(study, config, 'random', 0.6)
    assert control.model.backbone.sparsity.pop('selector') == 'random'
    learned.model.backbone.sparsity.pop('selector', None)
    assert control.to_dict() == learned.to_dict()
    (hook,) = sparse(study, config, 'no distillation', 0.6).custom_hooks
    assert hook.type == 'mmdynsparse.SparsityHook' and hook.weight == 10
    hook, _ = sparse(study, config, 'no ratio loss', 0.6).custom_hooks
    assert hook.type == 'mmdynsparse.SparsityHook' and hook.weight == 0
    dense = study.as_dense(study.load_config(config))
    assert dense.model.backbone.type == 'SwinTransformer' and not dense.custom_hooks
    assert dense.optim_wrapper.optimizer.lr == pytest.approx(2e-4)


def test_random_decisions_are_about_maps(study: ModuleType) -> None:
    """Proposals and masks are chosen as ever."""
    path = Path(study.__file__).parent / 'configs/study_mask-rcnn_swin-n_all-parts.py'
    model = sparse(study, path, 'random', 0.6).model
    assert model.backbone.sparsity.selector == model.neck.sparsity.selector == 'random'
    assert 'selector' not in model.roi_head.sparsity
    assert 'selector' not in model.roi_head.mask_head.sparsity


@pytest.mark.slow
def test_runs_and_reports(study: ModuleType, config: Path, tmp_path: Path) -> None:
    cfg = study.as_dense(study.load_config(config))
    init_default_scope(cfg.default_scope)
    start, out = tmp_path / 'start.pth', tmp_path / 'out'
    torch.save(MODELS.build(cfg.model).state_dict(), start)
    wanted = ['dense', 'learned-0.7']
    arguments = [config, '--start', start, '--out', out, '--iters', 2, '--variants', *wanted]
    changes = ['--cfg-options', 'optim_wrapper.optimizer.lr=1e-5']
    study.main(['run', *map(str, arguments), *changes])
    used = Config.fromfile(out / 'learned-0.7_seed-0' / 'config.py')
    assert used.optim_wrapper.optimizer.lr == 1e-5
    rows = [json.loads(path.read_text()) for path in out.glob('*_seed-0.json')]
    rows = {row['variant']: row for row in rows}
    assert rows.keys() == {'dense', 'dense, fine-tuned', 'learned'}
    assert all(0 <= row['metrics']['mIoU'] <= 100 for row in rows.values())
    learned = rows['learned']
    assert len(learned['keep_rates']) == len(learned['sampled_keep_rates']) > 0
    costs = [
        dict(
            part=part,
            keep_ratios=ratios,
            gmacs=1.0,
            median=time,
            speed_up=80.0 / time,
            breakdown=dict(backbone=time / 4, rest=time * 3 / 4, whole=time),
        )
        for part in ('backbone', 'whole')
        for ratios, time in (([], 80.0), ([0.7, 0.5], 40.0))
    ]
    (tmp_path / 'benchmark.json').write_text(json.dumps(dict(rows=costs)))
    untrained = tmp_path / 'untrained'
    arguments = [config, '--start', out / 'learned-0.7_seed-0/iter_2.pth', '--out', untrained]
    arguments += ['--iters', 0, '--variants', 'learned-0.7']
    study.main(['run', *map(str, arguments)])
    row = json.loads((untrained / 'learned-0.7_seed-0.json').read_text())
    assert row['metrics'] == learned['metrics'] and 'iters' not in row
    folder = tmp_path / 'report'
    study.main(
        ['report', '--out', str(folder), '--study', str(out), str(tmp_path / 'benchmark.json')]
    )
    table = json.loads((folder / 'study.json').read_text())['table']
    assert [line['variant'] for line in table] == ['dense', 'dense, fine-tuned', 'learned']
    assert table[2]['costs']['speed-up whole'] == 2
    assert (folder / 'accuracy-latency.png').stat().st_size > 1000
    text = (folder / 'study.md').read_text()
    assert '40 (2.00 x) |' in text
    assert text.endswith('| out | 0.7 | 20 -> 10 | 60 -> 30 | 80 -> 40 |\n\n')


def test_bad_input(study: ModuleType, config: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments in (
        ['run', config, '--start', 'nowhere.pth', '--out', 'out'],
        ['run', config, '--start', config, '--out', 'out', '--iters', -1],
        ['dense', config, '--start', config, '--out', 'out', '--lr', 1e-3, '--iters', 0],
        ['report', '--out', 'out', '--study', 'runs', 'nowhere.json'],
    ):
        with pytest.raises(SystemExit):
            study.main([str(argument) for argument in arguments])
    unknown = ['run', config, '--start', config, '--out', 'out', '--variants', 'learnt']
    with pytest.raises(SystemExit, match=r'--variants must be beginnings of dense, .*got learnt'):
        study.main([str(argument) for argument in unknown])
    errors = capsys.readouterr().err
    assert 'start must be an existing file, got nowhere.pth' in errors
    assert '--iters must be at least 0, got -1' in errors
    assert '--iters must be at least 1, got 0' in errors
    assert 'benchmark of runs must be an existing file, got nowhere.json' in errors
