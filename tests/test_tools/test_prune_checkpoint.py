"""tools/model_converters/prune_checkpoint.py on tiny models."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner

from mmdynsparse.datasets import write_scenes

ROOT = Path(__file__).parents[2]
TOOL = 'model_converters/prune_checkpoint.py'
SEARCH = """
model['backbone']['sparsity'] = None
model['backbone']['pruning'] = dict(search=True)
optim_wrapper['constructor'] = 'mmdynsparse.FineTuneOptimWrapperConstructor'
custom_hooks = [dict(type='mmdynsparse.SinglePathSearchHook', target=0.7)]
"""


@pytest.fixture
def search(write_config: Callable, tmp_path: Path) -> tuple[Path, Path]:
    """Config and checkpoint of a search, with random weights and gates."""
    return searched('seg', write_config, tmp_path)


def searched(task: str, write_config: Callable, folder: Path) -> tuple[Path, Path]:
    config = write_config(task, SEARCH, name=f'search-{task}')
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    for p in model.parameters():
        p.data.normal_(0, 0.2)
    torch.save(dict(state_dict=model.state_dict()), folder / 'searched.pth')
    return config, folder / 'searched.pth'


def build(config: Path, checkpoint: Path) -> torch.nn.Module:
    model = MODELS.build(Config.fromfile(config).model).eval()
    model.load_state_dict(torch.load(checkpoint)['state_dict'])
    return model


def test_the_pruned_model_is_the_searched_one(
    search: tuple, load_tool: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / 'new' / 'pruned'
    load_tool(TOOL).main([*map(str, search), '--out', str(out)])
    assert sorted(path.name for path in out.iterdir()) == ['pruned.pth', 'pruned.py']
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, got = build(*search)(x), build(out / 'pruned.py', out / 'pruned.pth')(x)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(Config, 'pretty_text', '')
    cfg = Config.fromfile(out / 'pruned.py')
    assert cfg.custom_hooks == [] and cfg.load_from == str(out / 'pruned.pth')
    cfg.work_dir = str(tmp_path / 'run')
    Runner.from_cfg(cfg).train()


@pytest.mark.slow
@pytest.mark.parametrize('task, host', [('seg', 'mmseg'), ('det', 'mmdet')])
def test_pruned_models_train_with_the_tools_of_their_library(
    task: str,
    host: str,
    write_config: Callable,
    load_tool: Callable,
    run_tool: Callable,
    tmp_path: Path,
) -> None:
    files = searched(task, write_config, tmp_path)
    load_tool(TOOL).main([*map(str, files), '--out', str(tmp_path / 'out')])
    tool = Path(find_spec(host).origin).parent / '.mim' / 'tools' / 'train.py'
    run_tool(tool, tmp_path / 'out' / 'pruned.py', '--work-dir', tmp_path / 'run')
    assert (tmp_path / 'run' / 'last_checkpoint').is_file()


QUICKSTART = """
_base_ = {base!r}
model = dict(
    backbone=dict(type='mmdynsparse.SparseSwinTransformer', pruning=dict(search=True))
)
optim_wrapper = dict(constructor='mmdynsparse.FineTuneOptimWrapperConstructor')
train_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False,
                        dataset=dict(data_root={data!r}))
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters={iters})
val_cfg = val_dataloader = val_evaluator = None
param_scheduler = []
custom_hooks = [
    dict(type='mmdynsparse.SinglePathSearchHook', target=0.7, gate_lr=5e-2, interval=5)
]
"""


@pytest.mark.slow
def test_a_short_search_on_the_quickstart_data(tmp_path: Path, run_tool: Callable) -> None:
    """It ends within 2% of its target, with no need to shift the gates."""
    write_scenes(tmp_path / 'data', 16, 1)
    base = str(ROOT / 'configs' / 'quickstart' / 'swin-xt_upernet_quickstart.py')
    config = tmp_path / 'search.py'
    config.write_text(QUICKSTART.format(base=base, data=str(tmp_path / 'data'), iters=150))
    log = run_tool('train.py', config, '--work-dir', tmp_path / 'run')
    found = json.loads((tmp_path / 'run' / 'architecture.json').read_text())
    assert found['share'] == pytest.approx(0.7, rel=0.02)
    assert 'The search ends' in log and 'gates shifted' not in log
    assert any(mixer == 'msa' for stage in found['mixers'] for mixer in stage)


def test_original_weights_and_another_config(
    search: tuple, write_config: Callable, load_tool: Callable, tmp_path: Path
) -> None:
    extra = "\nmodel['backbone']['sparsity'] = None\ntrain_cfg['max_iters'] = 7\n"
    finetune = write_config('seg', extra, name='finetune')
    dense = MODELS.build(Config.fromfile(finetune).model)
    torch.save(dict(state_dict=dense.state_dict()), tmp_path / 'dense.pth')
    args = ('--weights', 'original', '--original', tmp_path / 'dense.pth')
    args = (*search, *args, '--finetune', finetune, '--out', tmp_path / 'out')
    load_tool(TOOL).main([str(arg) for arg in args])
    state = torch.load(tmp_path / 'out' / 'pruned.pth')['state_dict']
    name = 'backbone.stages.0.blocks.0.norm2.weight'
    assert torch.equal(state[name], dense.state_dict()[name])
    assert Config.fromfile(tmp_path / 'out' / 'pruned.py').train_cfg.max_iters == 7


def test_published_checkpoints(
    recorded: Path, write_config: Callable, load_tool: Callable, tmp_path: Path
) -> None:
    record = torch.load(recorded / 'oracle' / 'spvit_swin.pth', weights_only=True)
    torch.save(dict(model=record['state_dict']), tmp_path / 'theirs.pth')
    given = record['config']
    extra = f"""
model['backbone'].update(embed_dims={given['embed_dim']}, depths={given['depths']},
    num_heads={given['num_heads']}, window_size={given['window_size']}, sparsity=None)
"""
    config = write_config('seg', extra, name='published')
    args = (config, tmp_path / 'theirs.pth', '--source', 'spvit', '--out', tmp_path / 'out')
    load_tool(TOOL).main([str(arg) for arg in args])
    pruning = Config.fromfile(tmp_path / 'out' / 'pruned.py').model.backbone.pruning
    assert pruning.to_dict() == dict(
        mixers=given['mixers'], hidden=given['hidden'], norm_identity=True
    )


def test_bad_input(search: tuple, write_config: Callable, fails: Callable, tmp_path: Path) -> None:
    out = ('--out', tmp_path / 'out')
    line = fails(TOOL, write_config('seg'), search[1], *out)
    assert 'config must be of a search' in line
    line = fails(TOOL, *search, '--weights', 'original', *out)
    assert '--original must be given with --weights original' in line
    assert "got 'x.pth'" in fails(TOOL, *search, '--original', 'x.pth', *out)
    torch.save(dict(state_dict={'a': torch.ones(1)}), tmp_path / 'other.pth')
    assert 'checkpoint must be of a search' in fails(TOOL, search[0], tmp_path / 'other.pth', *out)
    wider = write_config('seg', SEARCH + "model['backbone']['embed_dims'] = 24\n", name='wider')
    assert 'checkpoint must fit the backbone' in fails(TOOL, wider, search[1], *out)
    assert not (tmp_path / 'out').exists()
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'pruned.py').write_text('mine')
    assert '--out must not hold pruned files' in fails(TOOL, *search, *out)
    assert (tmp_path / 'out' / 'pruned.py').read_text() == 'mine'
    assert not (tmp_path / 'out' / 'pruned.pth').exists()
