"""Every config in ``configs/`` builds, means what its name says and matches its stock relative."""

import importlib.util
import inspect
import re
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, METRICS, PARAM_SCHEDULERS
from mmengine.runner import Runner

CONFIGS = Path(__file__).parents[1] / 'configs'
FILES = sorted(path for path in CONFIGS.rglob('*.py') if '_base_' not in path.parts)
IDS = [str(path.relative_to(CONFIGS)) for path in FILES]
PUBLISHED = [path for path in FILES if path.parent.name == 'sparse_swin']

UPERNET = 'upernet_8xb2-160k_ade20k-512x512.py'
STOCK = {
    f'sparse-swin-t_{UPERNET}': ('mmseg', f'swin-tiny-patch4-window7-in1k-pre_{UPERNET}'),
    f'sparse-swin-s_{UPERNET}': ('mmseg', f'swin-small-patch4-window7-in1k-pre_{UPERNET}'),
    f'sparse-swin-b_{UPERNET}': ('mmseg', f'swin-base-patch4-window7-in1k-pre_{UPERNET}'),
    f'sparse-swin-b-in22k-384x384-pre_{UPERNET}': (
        'mmseg',
        f'swin-base-patch4-window12-in22k-384x384-pre_{UPERNET}',
    ),
    'mask-rcnn_sparse-swin-t_fpn_1x_coco.py': ('mmdet', 'mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'),
    'mask-rcnn_sparse-swin-t_fpn_ms-crop-3x_coco.py': (
        'mmdet',
        'mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py',
    ),
    'mask-rcnn_sparse-swin-t_fpn_amp-ms-crop-3x_coco.py': (
        'mmdet',
        'mask-rcnn_swin-t-p4-w7_fpn_amp-ms-crop-3x_coco.py',
    ),
    'mask-rcnn_sparse-swin-s_fpn_amp-ms-crop-3x_coco.py': (
        'mmdet',
        'mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py',
    ),
}

SHARED_KEYS = (
    *('train_dataloader', 'val_dataloader', 'test_dataloader'),
    *('val_evaluator', 'test_evaluator', 'train_cfg', 'val_cfg', 'test_cfg'),
    *('optim_wrapper', 'param_scheduler', 'auto_scale_lr'),
    *('default_hooks', 'log_processor', 'env_cfg', 'visualizer', 'default_scope'),
)


def stock_config(library: str, name: str) -> Config:
    """Load a Swin config that an installed library ships."""
    package = Path(importlib.util.find_spec(library).origin).parent
    return Config.fromfile(package / '.mim' / 'configs' / 'swin' / name)


def plain(value):
    """Make configs comparable: no None entries, lists for tuples, no trailing slash in paths."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.rstrip('/') if isinstance(value, str) else value


@pytest.mark.parametrize('path', FILES, ids=IDS)
def test_builds(path, tmp_path, monkeypatch):
    """Model, hooks, visualizer, optimizer, schedulers, datasets, pipelines and metrics resolve."""
    # AmpOptimWrapper refuses to be constructed without an accelerator.
    monkeypatch.setattr(
        'mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available', lambda: True
    )
    # The Runner formats its config three times, which takes longer than all the rest.
    monkeypatch.setattr(Config, 'pretty_text', '')
    cfg = Config.fromfile(path)
    cfg.work_dir = str(tmp_path)
    cfg.visualizer.name = path.stem
    runner = Runner.from_cfg(cfg)
    runner.optim_wrapper = runner.build_optim_wrapper(cfg.optim_wrapper)
    _check_sparsity(cfg, runner)

    for scheduler in cfg.param_scheduler:
        PARAM_SCHEDULERS.build(dict(scheduler, optimizer=runner.optim_wrapper))
    num_classes = _num_classes(cfg.model)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        dataset = DATASETS.build(dict(loader.dataset, lazy_init=True))
        assert len(dataset.metainfo['classes']) == num_classes
    with METRICS.switch_scope_and_registry(None) as registry:
        assert registry.get(cfg.val_evaluator.type) is not None
        assert registry.get(cfg.test_evaluator.type) is not None


def _num_classes(model) -> int:
    """Return the number of classes that all heads of a model config agree on."""
    heads = [model.get('decode_head'), model.get('auxiliary_head')]
    roi = model.get('roi_head', {})
    heads += [roi.get('bbox_head'), roi.get('mask_head')]
    (num_classes,) = {head['num_classes'] for head in heads if head}
    return num_classes


def _check_sparsity(cfg, runner):
    """Check that predictors sit where they should, learn at the full rate and have their hook."""
    backbone = runner.model.backbone
    predictors = [name for name, _ in backbone.named_parameters() if '.predictors.' in name]
    hooked = any(type(hook).__name__ == 'SparsityHook' for hook in runner.hooks)
    if cfg.model.backbone.type == 'SwinTransformer':
        assert not predictors
        assert not hooked
        return
    assert predictors
    assert hooked
    blocks = (1, 2, 3) if cfg.model.backbone.depths[2] == 6 else (2, 4, 6)
    fast_paths = {name.split('.fast_path.')[0] for name, _ in backbone.named_parameters()}
    assert {f'stages.2.blocks.{block}' for block in blocks} <= fast_paths
    groups = runner.optim_wrapper.optimizer.param_groups
    assert {group['lr'] for group in groups} == {cfg.optim_wrapper.optimizer.lr}
    assert {group['weight_decay'] for group in groups} == {
        0.0,
        cfg.optim_wrapper.optimizer.weight_decay,
    }


@pytest.mark.parametrize('path', PUBLISHED, ids=[path.stem for path in PUBLISHED])
def test_name_tells_the_setting(path):
    """Sparse or dense, size, batch size, schedule, AMP, data and crop agree with the file name."""
    cfg = Config.fromfile(path)
    name = path.stem
    sparse, size = re.search(r'(?:^|_)(sparse-)?swin-([ntsb])[_-]', name).groups()
    backbone = cfg.model.backbone
    assert (backbone.type == 'mmdynsparse.SparseSwinTransformer') == bool(sparse)
    assert ('custom_hooks' in cfg) == bool(sparse)
    dims_and_depth = {'n': (48, 6), 't': (96, 6), 's': (96, 18), 'b': (128, 18)}
    assert (backbone.embed_dims, backbone.depths[2]) == dims_and_depth[size]
    assert ('amp-' in name) == (cfg.optim_wrapper.type == 'AmpOptimWrapper')
    assert re.search('ade20k|cityscapes|coco|camvid', name)[0][:3] in (
        cfg.train_dataloader.dataset.data_root
    )
    _check_schedule(name, cfg)
    if 'upernet' in name:
        crop = tuple(int(side) for side in re.search(r'-(\d+)x(\d+)$', name).groups())
        steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
        assert steps['RandomCrop'].crop_size == crop
        assert cfg.model.data_preprocessor.size == crop


def _check_schedule(name, cfg):
    """Check length and batch size against the name, and that the learning rate ends with them."""
    epochs = re.search(r'[_-](\d)x_', name)
    if epochs:
        length = 12 * int(epochs[1])
        assert cfg.train_cfg.max_epochs == length
        assert cfg.train_dataloader.batch_size == 2
    else:
        batch, thousands = re.search(r'_\dxb(\d)-(\d+)k_', name).groups()
        length = 1000 * int(thousands)
        assert cfg.train_cfg.max_iters == length
        assert cfg.train_dataloader.batch_size == int(batch)
    assert cfg.param_scheduler[-1].end == length


@pytest.mark.parametrize('name', STOCK)
def test_differs_from_stock_only_in_the_backbone(name):
    """Data, schedule, optimizer, hooks, heads and Swin arguments are those of the stock config."""
    ours = Config.fromfile(CONFIGS / 'sparse_swin' / name)
    stock = stock_config(*STOCK[name])
    for key in SHARED_KEYS:
        assert plain({key: ours.get(key)}) == plain({key: stock.get(key)}), key
    our_swin, stock_swin = ours.model.pop('backbone'), stock.model.pop('backbone')
    assert plain(ours.model) == plain(stock.model)
    assert _with_defaults(our_swin) == _with_defaults(stock_swin)


def _with_defaults(backbone):
    """Complete a Swin config with the stock defaults; weights are compared by their file name."""
    from mmdet.models import SwinTransformer

    signature = inspect.signature(SwinTransformer.__init__).parameters.values()
    full = {item.name: item.default for item in signature if item.name != 'self'}
    full.update({key: value for key, value in backbone.items() if key not in ('type', 'sparsity')})
    full['norm_cfg'] = {'requires_grad': True, **full['norm_cfg']}
    full['init_cfg'] = full['init_cfg']['checkpoint'].rsplit('/', 1)[-1]
    return plain(full)


def test_readme_and_metafile_list_every_config():
    """The family's README links each config and the metafile names each, and nothing else."""
    folder = CONFIGS / 'sparse_swin'
    names = {path.name for path in PUBLISHED}
    readme = (folder / 'README.md').read_text(encoding='utf-8')
    assert set(re.findall(r'\]\(\./([^)]+\.py)\)', readme)) == names
    models = Config.fromfile(folder / 'metafile.yml').Models
    assert {Path(model.Config).name for model in models} == names
    assert {f'{model.Name}.py' for model in models} == names
