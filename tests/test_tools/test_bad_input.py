"""Wrong arguments and files end in one line that names what is allowed and what was received."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope


@pytest.fixture(scope='module')
def broken_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints that cannot be used, by what is wrong with them."""
    folder = tmp_path_factory.mktemp('broken')
    whole = folder / 'weights_only.pth'
    torch.save(dict(state_dict={'backbone.weight': torch.zeros(1000)}), whole)
    files = {'weights_only': whole, 'missing': folder / 'missing.pth'}
    files['truncated'] = folder / 'truncated.pth'
    files['truncated'].write_bytes(whole.read_bytes()[:-500])
    files['text'] = folder / 'text.pth'
    files['text'].write_text('not a checkpoint')
    files['tensor'] = folder / 'tensor.pth'
    torch.save(torch.zeros(3), files['tensor'])
    return files


@pytest.mark.parametrize('tool', ['train.py', 'test.py'])
def test_config(tool: str, fails: Callable, tmp_path: Path) -> None:
    rest = ['none.pth'] if tool == 'test.py' else []
    line = fails(tool, tmp_path / 'none.py', *rest)
    assert line.startswith(f'{tool}: error: config must be an existing file')
    broken = tmp_path / 'broken.py'
    broken.write_text('model = dict(')
    assert 'config must be a readable config file' in fails(tool, broken, *rest)
    broken.write_text("_base_ = './none.py'")
    assert 'none.py' in fails(tool, broken, *rest)


def test_command_line(fails: Callable, write_config: Callable) -> None:
    config = write_config('seg')
    assert "invalid choice: 'torch'" in fails('train.py', config, '--launcher', 'torch')
    assert 'KEY=VALUE' in fails('train.py', config, '--cfg-options', 'model.backbone')
    line = fails('train.py', config, '--cfg-options', 'model.type.name=1')
    assert '--cfg-options' in line and 'model.type.name' in line
    assert 'got no RANK' in fails('train.py', config, '--launcher', 'pytorch')
    line = fails('train.py', config, '--auto-scale-lr')
    assert 'auto_scale_lr.base_batch_size' in line
    option = 'optim_wrapper.type=OptimWrapperDict'
    line = fails('train.py', config, '--amp', '--cfg-options', option)
    assert "got 'OptimWrapperDict'" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason='Slurm can be used where there is CUDA')
def test_slurm_without_cuda(fails: Callable, write_config: Callable, tmp_path: Path) -> None:
    args = ('--launcher', 'slurm', '--work-dir', tmp_path)
    line = fails('train.py', write_config('seg'), *args)
    assert "--launcher must be 'none' or 'pytorch' on a machine without CUDA, got 'slurm'" in line


@pytest.mark.parametrize(
    ('task', 'library', 'extra'), [('seg', 'mmseg', 'seg'), ('det', 'mmdet', 'det')]
)
def test_missing_library(
    task: str,
    library: str,
    extra: str,
    fails: Callable,
    write_config: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    assert f'pip install mmdynsparse[{extra}]' in fails('train.py', write_config(task))


def test_other_scope(fails: Callable, write_config: Callable) -> None:
    config = write_config('seg', "default_scope = 'mmpretrain'\n", name='scope')
    line = fails('train.py', config)
    assert "default_scope of the config must be 'mmseg' or 'mmdet', got 'mmpretrain'" in line


@pytest.mark.parametrize('fault', ['missing', 'truncated', 'text', 'tensor'])
@pytest.mark.parametrize(
    'argument', ['load_from', 'model.backbone.init_cfg.checkpoint', 'resume', 'checkpoint']
)
def test_checkpoint(
    argument: str,
    fault: str,
    fails: Callable,
    write_config: Callable,
    broken_files: dict,
    tmp_path: Path,
) -> None:
    config, path = write_config('seg'), broken_files[fault]
    options = ['--work-dir', tmp_path]
    if argument == 'checkpoint':
        line = fails('test.py', config, path, *options)
    elif argument == 'resume':
        line = fails('train.py', config, '--resume', path, *options)
    else:
        if 'init_cfg' in argument:
            options += ['--cfg-options', 'model.backbone.init_cfg.type=Pretrained']
        else:
            options += ['--cfg-options']
        line = fails('train.py', config, *options, f'{argument}={path}')
    assert argument in line and str(path) in line
    expected = dict(missing='existing checkpoint', tensor='got a Tensor')
    assert expected.get(fault, 'corrupt') in line


class Command:
    """Runs a command of the shell when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


@pytest.mark.parametrize('tool', ['train.py', 'test.py'])
@pytest.mark.parametrize('download', [False, True])
def test_checkpoint_that_runs_commands(
    tool: str,
    download: bool,
    fails: Callable,
    write_config: Callable,
    address: tuple[Path, str],
    tmp_path: Path,
) -> None:
    folder, url = address
    torch.save(dict(state_dict={}, meta=Command(f'touch {tmp_path}/ran')), folder / 'bad.pth')
    path = f'{url if download else folder}/bad.pth'
    args = [path] if tool == 'test.py' else ['--cfg-options', f'load_from={path}']
    line = fails(tool, write_config('seg'), *args, '--work-dir', tmp_path)
    assert 'must hold weights' in line and path in line and 'system' in line
    assert 'torch.save(' in line and not (tmp_path / 'ran').exists()


def test_resume_from_weights_only(
    fails: Callable, write_config: Callable, broken_files: dict, tmp_path: Path
) -> None:
    args = ('--resume', broken_files['weights_only'], '--work-dir', tmp_path)
    assert 'got only weights' in fails('train.py', write_config('seg'), *args)


def test_latest_checkpoint_is_gone(fails: Callable, write_config: Callable, tmp_path: Path) -> None:
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_2.pth'))
    line = fails('train.py', write_config('seg'), '--resume', '--work-dir', tmp_path)
    assert 'iter_2.pth' in line


@pytest.mark.parametrize(
    ('task', 'option', 'expected'),
    [
        ('seg', 'train_dataloader.dataset.data_root=none', 'train_dataloader.dataset.data_root'),
        (
            'seg',
            'val_dataloader.dataset.data_prefix.seg_map_path=none',
            'val_dataloader.dataset.data_prefix.seg_map_path',
        ),
        (
            'det',
            'train_dataloader.dataset.dataset.ann_file=none.json',
            'train_dataloader.dataset.dataset.ann_file must be an existing file',
        ),
        ('det', 'val_evaluator.ann_file=none.json', 'val_evaluator.ann_file'),
    ],
)
def test_data(
    task: str, option: str, expected: str, fails: Callable, write_config: Callable, tmp_path: Path
) -> None:
    line = fails(
        'train.py', write_config(task), '--work-dir', tmp_path / 'run', '--cfg-options', option
    )
    assert expected in line and 'none' in line


def test_data_in_wrapped_and_joined_datasets(fails: Callable, write_config: Callable) -> None:
    extra = (
        'inner = train_dataloader["dataset"]\n'
        'other = dict(inner, data_prefix=dict(img_path="none"))\n'
        'joined = dict(type="ConcatDataset", datasets=[inner, other])\n'
        'train_dataloader["dataset"] = dict(type="RepeatDataset", times=2, dataset=joined)\n'
    )
    line = fails('train.py', write_config('seg', extra, name='joined'))
    name = 'train_dataloader.dataset.dataset.datasets[1].data_prefix.img_path'
    assert f'{name} must be an existing folder' in line


def test_data_of_test(fails: Callable, write_config: Callable, broken_files: dict) -> None:
    args = (broken_files['weights_only'], '--cfg-options', 'test_dataloader.dataset.data_root=none')
    line = fails('test.py', write_config('seg'), *args)
    assert "test_dataloader.dataset.data_root must be an existing folder, got 'none'" in line


@pytest.mark.parametrize(
    ('task', 'option'),
    [
        ('seg', 'train_dataloader.dataset.img_suffix=.bmp'),
        ('det', 'train_dataloader.dataset.dataset.filter_cfg.min_size=1000'),
    ],
)
def test_dataset_without_images(
    task: str, option: str, fails: Callable, write_config: Callable, tmp_path: Path
) -> None:
    line = fails('train.py', write_config(task), '--work-dir', tmp_path, '--cfg-options', option)
    assert 'train_dataloader.dataset must hold at least 1 image, got 0' in line


@pytest.mark.parametrize(
    ('option', 'received'),
    [
        ('keep_ratio=1.5', '1.5'),
        ('keep_ratio=[0.5,0.4]', '2'),
        ('locations={2:(7,)}', '7'),
        ('selector=best', 'best'),
    ],
)
def test_sparsity(
    option: str, received: str, fails: Callable, write_config: Callable, tmp_path: Path
) -> None:
    key, value = option.split('=')
    extra = (
        f'model["backbone"]["sparsity"][{key!r}] = {value if key != "selector" else repr(value)}\n'
    )
    line = fails('train.py', write_config('seg', extra, name='wrong'), '--work-dir', tmp_path)
    assert key in line and received in line


def test_output_of_detector(fails: Callable, write_config: Callable, broken_files: dict) -> None:
    args = (broken_files['weights_only'], '--out', 'predictions.json')
    line = fails('test.py', write_config('det'), *args)
    assert "--out must end in '.pkl' or '.pickle' for mmdet, got 'predictions.json'" in line


def test_augmentation(fails: Callable, write_config: Callable, broken_files: dict) -> None:
    args = (broken_files['weights_only'], '--tta')
    assert 'model.roi_head.mask_head' in fails('test.py', write_config('det'), *args)
    config = write_config('seg', 'tta_pipeline = None\n', name='no_tta')
    assert "got no ['tta_pipeline']" in fails('test.py', config, *args)


def test_pictures_without_hook(fails: Callable, write_config: Callable, broken_files: dict) -> None:
    config = write_config('seg', 'del default_hooks["visualization"]\n', name='no_hook')
    line = fails('test.py', config, broken_files['weights_only'], '--show-dir', 'painted')
    assert 'default_hooks.visualization' in line


def test_weights_of_another_model(
    fails: Callable, write_config: Callable, broken_files: dict, tmp_path: Path
) -> None:
    args = (broken_files['weights_only'], '--work-dir', tmp_path)
    line = fails('test.py', write_config('seg'), *args)
    assert 'missing keys (backbone.' in line
    assert '1 unexpected keys (backbone.weight)' in line


def test_budget_that_the_checkpoint_does_not_have(
    fails: Callable, write_config: Callable, tmp_path: Path
) -> None:
    config = write_config('seg')
    init_default_scope('mmseg')
    torch.save(MODELS.build(Config.fromfile(config).model).state_dict(), tmp_path / 'x.pth')
    line = fails('test.py', config, tmp_path / 'x.pth', '--work-dir', tmp_path, '--budget', '0.6')
    assert 'budget must be 1.0 or one that the model has (none' in line and 'got 0.6' in line


DENSE = 'model["backbone"] = dict(model["backbone"], type="SwinTransformer")\n'
DENSE += 'model["backbone"].pop("sparsity")\n'
LATE = 'custom_hooks.append(dict(type="mmdynsparse.FreezePretrained", iters=100))\n'
REFUSED = {
    'dense model': (DENSE, 'SparsityHook needs a model with a sparse part'),
    'frozen': (LATE, "iters of FreezePretrained must be at most the training's 4 iterations"),
    'optimizer': (
        'optim_wrapper.update(constructor="mmdynsparse.FineTuneOptimWrapperConstructor", '
        'paramwise_cfg=dict(pretrained_lr_mult=2))\n',
        r'pretrained_lr_mult must be in [0, 1], got 2',
    ),
}


@pytest.mark.parametrize(('extra', 'expected'), REFUSED.values(), ids=REFUSED)
def test_refused_at_the_start_of_training(
    extra: str, expected: str, fails: Callable, write_config: Callable, tmp_path: Path
) -> None:
    config = write_config('seg', extra, name='refused')
    assert expected in fails('train.py', config, '--work-dir', tmp_path)


def test_refused_at_the_start_of_testing(
    fails: Callable, write_config: Callable, tmp_path: Path
) -> None:
    config = write_config('seg', DENSE, name='dense')
    init_default_scope('mmseg')
    model = MODELS.build(Config.fromfile(config).model)
    torch.save(model.state_dict(), tmp_path / 'dense.pth')
    line = fails('test.py', config, tmp_path / 'dense.pth', '--work-dir', tmp_path)
    assert REFUSED['dense model'][1] in line


def test_errors_of_iterations_have_their_traceback(
    fails: Callable, load_tool: Callable, write_config: Callable, tmp_path: Path
) -> None:
    """Here the head finds out that the backbone decides nothing."""
    extra = (
        f'{DENSE}custom_hooks = []\n'
        'model["decode_head"].update(type="mmdynsparse.SparseUPerHead", '
        'norm_cfg=dict(type="BN"), sparsity=dict(keep_ratio=0.5, predictor="backbone"))\n'
    )
    config = write_config('seg', extra, name='undecided')
    with pytest.raises(ValueError, match='needs feature maps that carry decisions'):
        load_tool('train.py').main([str(config), '--work-dir', str(tmp_path)])
