"""Every config in ``configs/`` builds, means what its name says and matches its stock relative."""

import importlib.util
import inspect
import re
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, METRICS, PARAM_SCHEDULERS, DefaultScope
from mmengine.runner import Runner

from mmdynsparse.analysis import dense_config
from mmdynsparse.models import SparseConvNeXt, SparseResNet
from mmdynsparse.models.backbones.convnext import ARCHS as CONVNEXTS
from mmdynsparse.models.backbones.resnet import ARCHS as RESNETS
from mmdynsparse.utils.checkpoints import is_new

CONFIGS = Path(__file__).parents[1] / 'configs'
FILES = sorted(path for path in CONFIGS.rglob('*.py') if '_base_' not in path.parts)
IDS = [str(path.relative_to(CONFIGS)) for path in FILES]
FAMILIES = ('sparse_convnext', 'sparse_heads', 'sparse_resnet', 'sparse_swin', 'sparse_vit')
PUBLISHED = [path for path in FILES if path.parent.name in FAMILIES]
PRUNED = [path for path in FILES if path.parent.name == 'spvit']
ONE_STAGE = [path for path in FILES if path.parent.name == 'one_stage']
# Width of the first stage and depth of the third; of the only one in ViT.
SIZES = {
    'convnext': {'n': (48, 9), 't': (96, 9), 's': (96, 27)},
    'swin': {'n': (48, 6), 't': (96, 6), 's': (96, 18), 'b': (128, 18)},
    'vit': {'n': (192, 12), 's': (384, 12), 'b': (768, 12)},
    'deit': {'s': (384, 12)},
    'r': {'50-n': (32, 6), '50': (64, 6), '101': (64, 23)},
}
# Depth of that stage: the blocks before which predictors sit, as published. ResNet has its own.
LOCATIONS = {6: (1, 2, 3), 9: (1, 2, 3), 12: (3, 6, 9), 18: (2, 4, 6), 27: (3, 6, 9)}

UPERNET = 'upernet_8xb2-160k_ade20k-512x512.py'
UPERNET_AMP = 'upernet_8xb2-amp-160k_ade20k-512x512.py'
ADE20K = '4xb4-160k_ade20k-512x512.py'
STOCK = {
    f'sparse-swin-t_{UPERNET}': ('mmseg', f'swin-tiny-patch4-window7-in1k-pre_{UPERNET}'),
    f'sparse-swin-s_{UPERNET}': ('mmseg', f'swin-small-patch4-window7-in1k-pre_{UPERNET}'),
    'mask-rcnn_sparse-swin-t_fpn_1x_coco.py': ('mmdet', 'mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'),
    f'sparse-convnext-s_{UPERNET_AMP}': ('mmseg', f'convnext-small_{UPERNET_AMP}'),
    f'sparse-vit-b_mln_{UPERNET}': ('mmseg', f'vit_vit-b16_mln_{UPERNET}'),
    'sparse-deit-s_upernet_8xb2-80k_ade20k-512x512.py': (
        'mmseg',
        'vit_deit-s16_upernet_8xb2-80k_ade20k-512x512.py',
    ),
    f'upernet_sparse-r50_{ADE20K}': ('mmseg', f'upernet_r50_{ADE20K}'),
    'mask-rcnn_sparse-r50_fpn_1x_coco.py': ('mmdet', 'mask-rcnn_r50_fpn_1x_coco.py'),
}
RETINANET, FCOS = 'retinanet_r50_fpn_1x_coco.py', 'fcos_r50-caffe_fpn_gn-head_1x_coco.py'
STOCK_ONE_STAGE = {
    'retinanet_r50_sparse-head_1x_coco.py': RETINANET,
    'retinanet_sparse-r50_sparse-fpn_sparse-head_1x_coco.py': RETINANET,
    'fcos_r50-caffe_sparse-head_1x_coco.py': FCOS,
    'atss_r50_sparse-head_1x_coco.py': 'atss_r50_fpn_1x_coco.py',
}

SHARED_KEYS = (
    *('train_dataloader', 'val_dataloader', 'test_dataloader'),
    *('val_evaluator', 'test_evaluator', 'train_cfg', 'val_cfg', 'test_cfg'),
    *('optim_wrapper', 'param_scheduler', 'auto_scale_lr'),
    *('default_hooks', 'log_processor', 'env_cfg', 'visualizer', 'default_scope'),
)


def stock_config(library: str, name: str) -> Config:
    """Load a config that an installed library ships."""
    package = Path(importlib.util.find_spec(library).origin).parent
    (path,) = (package / '.mim' / 'configs').glob(f'*/{name}')
    # The ConvNeXt configs import mmpretrain, which is not required.
    return Config.fromfile(path, import_custom_modules=False)


def plain(value):
    """Make configs comparable: no None entries, lists for tuples, no trailing slash in paths.

    The scope, which mmengine writes into what is inherited from a library, is left out.
    """
    if isinstance(value, dict):
        items = ((key, item) for key, item in value.items() if key != '_scope_')
        return {key: plain(item) for key, item in items if item is not None}
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
    # The quickstart evaluates by tools/test.py alone.
    splits = ['train', 'test'] if path.parent.name == 'quickstart' else ['train', 'val', 'test']
    loaders = {name for name in cfg if name.endswith('_dataloader')}
    assert loaders == {f'{split}_dataloader' for split in splits}
    for split in splits:
        dataset = DATASETS.build(dict(cfg[f'{split}_dataloader'].dataset, lazy_init=True))
        assert len(dataset.metainfo['classes']) == num_classes
    with METRICS.switch_scope_and_registry(None) as registry:
        for split in splits[1:]:
            assert registry.get(cfg[f'{split}_evaluator'].type) is not None


def _num_classes(model) -> int:
    """Return the number of classes that all heads of a model config agree on."""
    heads = [model.get(key) for key in ('decode_head', 'auxiliary_head', 'bbox_head')]
    roi = model.get('roi_head', {})
    boxes = roi.get('bbox_head')
    heads += [*(boxes if isinstance(boxes, list) else [boxes]), roi.get('mask_head')]
    (num_classes,) = {head['num_classes'] for head in heads if head}
    return num_classes


def _check_sparsity(cfg, runner):
    """Check that predictors sit where they should, learn at the full rate and have their hook."""
    backbone = runner.model.backbone
    new = [n for n, _ in backbone.named_parameters() if re.search(r'predictors\.|fast_path\.', n)]
    hooked = any(type(hook).__name__ == 'SparsityHook' for hook in runner.hooks)
    if cfg.model.backbone.get('sparsity') is None:
        assert not new
        assert not hooked
        return
    assert hooked
    if cfg.model.backbone.sparsity.get('follow'):
        # In detectors the first two stages are dense, as docs/study.md has measured.
        first = 2 if 'rpn_head' in cfg.model else 0
        predictors = [0, 0, 1, 0] if first else [1, 0, 1, 0]
        assert [len(stage.predictors) for stage in backbone.stages] == predictors
        for i, stage in enumerate(backbone.stages):
            assert all(block.sparse_attention for block in stage.blocks)
            assert all((block.fast_path is not None) == (i >= first) for block in stage.blocks)
        _check_optimizer(cfg.optim_wrapper, runner)
        return
    if not backbone.decider.learns:
        assert not new and backbone.stage_locations(0) == (3,)
        _check_optimizer(cfg.optim_wrapper, runner)
        return
    assert len({re.search(r'predictors\.\d+', n)[0] for n in new if 'predictors.' in n}) == 3
    _check_optimizer(cfg.optim_wrapper, runner)
    if 'depth' in cfg.model.backbone:
        assert [backbone.stage_locations(i) for i in range(4)] == [(), (1,), (1,), (1,)]
        assert len(set(backbone.keep_ratios)) == 1
        # Detectors need a light branch, as docs/study.md has measured.
        assert any('fast_path' in n for n in new) == ('decode_head' not in cfg.model)
        return
    blocks = LOCATIONS[_width_and_depth(cfg.model.backbone)[1]]
    if 'num_layers' in cfg.model.backbone:
        assert backbone.stage_locations(0) == blocks
        assert not any('fast_path' in n for n in new)
        return
    prefix = 'stages.2.' if 'arch' in cfg.model.backbone else 'stages.2.blocks.'
    fast_paths = {n.split('.fast_path.')[0] for n in new}
    assert {f'{prefix}{block}' for block in blocks} <= fast_paths
    assert f'{prefix}{blocks[0] - 1}' not in fast_paths


def _check_optimizer(optim_cfg, runner):
    """Check learning rates and weight decays of the optimizer of a sparse model."""
    backbone = runner.model.backbone
    groups = runner.optim_wrapper.optimizer.param_groups
    base_lr, decay = optim_cfg.optimizer.lr, optim_cfg.optimizer.weight_decay
    undecayed = {0.0} if 'paramwise_cfg' in optim_cfg else set()
    assert {group['weight_decay'] for group in groups} == {decay} | undecayed
    lrs = {id(p): group['lr'] for group in groups for p in group['params']}
    assert lrs.keys() == {id(p) for p in runner.model.parameters()}
    if 'constructor' not in optim_cfg:
        assert set(lrs.values()) == {base_lr}
        return
    if optim_cfg.constructor == 'mmdynsparse.FineTuneOptimWrapperConstructor':
        for name, p in runner.model.named_parameters():
            share = 1 if is_new(name) else optim_cfg.paramwise_cfg.pretrained_lr_mult
            assert lrs[id(p)] == pytest.approx(share * base_lr), name
        return
    # Layer decay: predictors at the full rate like the heads, fast paths like their block.
    assert {lrs[id(p)] for p in backbone.predictors.parameters()} == {base_lr}
    for block in (block for stage in backbone.stages for block in stage):
        (lr,) = {lrs[id(p)] for p in block.parameters()}
        assert lr < base_lr


def _width_and_depth(backbone) -> tuple[int, int]:
    """Return the width of the first stage and the depth of the third of a backbone config."""
    if 'num_layers' in backbone:
        return backbone.embed_dims, backbone.num_layers
    if 'depth' in backbone:
        return backbone.get('base_channels', 64), RESNETS[backbone.depth][1][2]
    if 'arch' not in backbone:
        return backbone.embed_dims, backbone.depths[2]
    arch = backbone.arch
    depths, channels = CONVNEXTS[arch] if isinstance(arch, str) else (arch.depths, arch.channels)
    return channels[0], depths[2]


@pytest.mark.parametrize('path', PUBLISHED, ids=[path.stem for path in PUBLISHED])
def test_name_tells_the_setting(path):
    """Sparse or dense, size, batch size, schedule, AMP, data, crop, neck agree with the name."""
    cfg = Config.fromfile(path)
    name = path.stem
    backbone_name = r'(?:^|_)(sparse-)?(swin-|convnext-|vit-|deit-|r)([ntsb]|50-n|50|101)[_-]'
    sparse, family, size = re.search(backbone_name, name).groups()
    family = family.removesuffix('-')
    folder = {'deit': 'vit', 'r': 'resnet'}.get(family, family)
    assert path.parent.name in (f'sparse_{folder}', 'sparse_heads')
    backbone = cfg.model.backbone
    own = {'convnext': 'SparseConvNeXt', 'vit': 'SparseVisionTransformer'}
    if family == 'convnext' or '_sfp_' in name:
        # Dense and sparse, because the dense original needs mmpretrain, or mmseg in a detector.
        assert backbone.type == f'mmdynsparse.{own[family]}'
    else:
        originals = dict(swin='SwinTransformer', vit='VisionTransformer', resnet='ResNet')
        original = originals[folder]
        if folder == 'resnet' and 'upernet' in name:
            original = 'ResNetV1c'
        assert backbone.type == (f'mmdynsparse.Sparse{original}' if sparse else original)
    assert ('sparsity' in backbone) == bool(sparse)
    hooks = {hook.type.removeprefix('mmdynsparse.'): hook for hook in cfg.get('custom_hooks', [])}
    finetune = ('DistillationHook', 'FreezePretrained') if '-finetune-' in name else ()
    joint = ('DenseSparseSchedule', 'DistillationHook') if '_sait_' in name else ()
    assert set(hooks) == {*finetune, *joint, *(('SparsityHook',) if sparse else ())}
    if sparse and not joint:
        assert hooks['SparsityHook'].weight == _ratio_weight(family, size)
    assert _width_and_depth(backbone) == SIZES[family][size]
    assert ('amp-' in name) == (cfg.optim_wrapper.type == 'AmpOptimWrapper')
    assert re.search('ade20k|coco|camvid', name)[0][:3] in (cfg.train_dataloader.dataset.data_root)
    _check_schedule(name, cfg)
    if family in ('vit', 'deit'):
        neck = cfg.model.get('neck') or {}
        assert (neck.get('type') == 'MultiLevelNeck') == ('_mln_' in name)
        pyramid = 'mmdynsparse.SimpleFeaturePyramid'
        assert (neck.get('type') == pyramid) == ('_sfp_' in name) == ('mask-rcnn' in name)
    if 'upernet' in name:
        crop = tuple(int(side) for side in re.search(r'-(\d+)x(\d+)$', name).groups())
        steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
        assert steps['RandomCrop'].crop_size == crop
        assert cfg.model.data_preprocessor.size == crop


def _ratio_weight(family, size) -> float:
    """Return the published weight of the ratio loss; ours have that of the other CNN."""
    if family not in ('vit', 'deit') or size == 'n':
        return 10.0
    return 5.0 if size == 'b' else 2.0


def _check_schedule(name, cfg):
    """Check length and batch size against the name, and that the learning rate ends with them."""
    epochs = re.search(r'[_-](\d)x_|finetune-(\d)e_', name)
    if epochs:
        length = 12 * int(epochs[1]) if epochs[1] else int(epochs[2])
        assert cfg.train_cfg.max_epochs == length
        assert cfg.train_dataloader.batch_size == 2
    else:
        lengths = r'_\dxb(\d)-(?:amp-|finetune-)?(\d+)(k?)_'
        batch, number, thousands = re.search(lengths, name).groups()
        length = int(number) * (1000 if thousands else 1)
        assert cfg.train_cfg.max_iters == length
        assert cfg.train_dataloader.batch_size == int(batch)
    assert cfg.param_scheduler[-1].end == length


@pytest.mark.parametrize('name', STOCK)
def test_differs_from_stock_only_in_the_backbone(name):
    """Data, schedule, optimizer, heads and the backbone's arguments are the stock config's."""
    (path,) = [path for path in PUBLISHED if path.name == name]
    ours = Config.fromfile(path)
    stock = stock_config(*STOCK[name])
    for key in SHARED_KEYS:
        assert plain({key: ours.get(key)}) == plain({key: stock.get(key)}), key
    our_backbone, stock_backbone = ours.model.pop('backbone'), stock.model.pop('backbone')
    if pretrained := stock.model.pop('pretrained', None):
        stock_backbone.init_cfg = dict(type='Pretrained', checkpoint=pretrained)
    assert plain(ours.model) == plain(stock.model)
    assert _with_defaults(our_backbone) == _with_defaults(stock_backbone)


def _with_defaults(backbone):
    """Complete a backbone config with defaults; weights are compared by their file name."""
    from mmdet.models import SwinTransformer
    from mmseg.models import VisionTransformer

    given = {'num_layers': VisionTransformer, 'arch': SparseConvNeXt, 'depth': SparseResNet}
    (original,) = [given[key] for key in given if key in backbone] or [SwinTransformer]
    signature = inspect.signature(original.__init__).parameters.values()
    full = {item.name: item.default for item in signature if item.name != 'self'}
    full.update({key: value for key, value in backbone.items() if key not in ('type', 'sparsity')})
    full['norm_cfg'] = {'requires_grad': True, **(full['norm_cfg'] or {})}
    full['init_cfg'] = full['init_cfg']['checkpoint'].rsplit('/', 1)[-1]
    return plain(full)


ROI = [path for path in PUBLISHED if 'sparse-roi' in path.name]
HEADS = [path for path in PUBLISHED if path.parent.name == 'sparse_heads' and path not in ROI]


@pytest.mark.parametrize('path', HEADS, ids=[path.stem for path in HEADS])
def test_sparse_heads_differ_from_their_relative_in_neck_and_head(path):
    """The name says which parts are sparse; all else is the config it is named after."""
    cfg, name = Config.fromfile(path), path.name
    relative = name.replace('sparse-upernet', 'upernet').replace('sparse-fpn', 'fpn')
    relative = re.sub('-by-level|-entropy|-by-backbone', '', relative)
    if relative.startswith('swin-t'):
        # The dense one is mmsegmentation's, to which the sparse one is compared above.
        expected = Config.fromfile(CONFIGS / 'sparse_swin' / f'sparse-{relative}')
        for key in ('custom_hooks', 'pretrained'):
            expected.pop(key)
        expected.model.backbone.type = 'SwinTransformer'
        del expected.model.backbone['sparsity'], expected.model.backbone['init_cfg']
    else:
        (relative,) = [item for item in PUBLISHED if item.name == relative and item != path]
        expected = Config.fromfile(relative)
    if '-finetune-' in name:
        expected.custom_hooks[1].logit_weight = 5.0
    parts = ('decode_head',) if 'upernet' in name else ('neck', 'rpn_head')
    sparsities = [cfg.model[part].pop('sparsity') for part in parts]
    for part in parts:
        dense, sparse = expected.model[part].pop('type'), cfg.model[part].pop('type')
        assert sparse == f'mmdynsparse.Sparse{dense}'
    assert plain(cfg.to_dict()) == plain(expected.to_dict())
    if 'by-level' in name:
        assert sparsities == [{}]
        return
    assert sparsities[0].pop('keep_ratio') == (0.3 if 'upernet' in name else 0.5)
    learned = dict(predictor=dict(type='mmdynsparse.CellPredictor'))
    if 'by-backbone' in name:
        assert sparsities == [dict(predictor='backbone'), {}][: len(parts)]
    elif 'upernet' in name:
        assert sparsities == [{} if 'entropy' in name else learned]
    else:
        assert sparsities == [{}, {}]


@pytest.mark.parametrize('path', ROI, ids=[path.stem for path in ROI])
def test_sparse_roi_heads_differ_from_their_relative_in_these(path):
    """All else is the config it is named after, ours or mmdetection's."""
    cfg, relative = Config.fromfile(path), path.name.replace('_sparse-roi', '')
    ours = [item for item in HEADS if item.name == relative]
    expected = Config.fromfile(ours[0]) if ours else stock_config('mmdet', relative)
    roi = cfg.model.roi_head
    heads = {'roi_head': (roi, 0.3), 'mask_head': (roi.get('mask_head'), 0.5)}
    for name, (head, keep_ratio) in heads.items():
        dense = expected.model.roi_head
        dense = dense if name == 'roi_head' else dense.get(name)
        if head is None:
            assert dense is None
            continue
        assert head.pop('type') == f'mmdynsparse.Sparse{dense.pop("type")}'
        assert head.pop('sparsity') == dict(keep_ratio=keep_ratio)
    assert plain(cfg.model.to_dict()) == plain(expected.model.to_dict())
    for key in SHARED_KEYS:
        assert plain({key: cfg.get(key)}) == plain({key: expected.get(key)}), key


@pytest.mark.parametrize('path', PRUNED, ids=[path.stem for path in PRUNED])
def test_name_tells_what_is_pruned(path):
    """Search or fixed architecture, size, data, schedule and crop agree with the name."""
    cfg, name = Config.fromfile(path), path.stem
    family, size = re.search(r'spvit-(swin|deit|vit)-([ntsb])_', name).groups()
    backbone, is_search = cfg.model.backbone, '-search-' in name or '_search-' in name
    kind = 'SparseSwinTransformer' if family == 'swin' else 'SparseVisionTransformer'
    assert backbone.type == f'mmdynsparse.{kind}' and 'sparsity' not in backbone
    assert _width_and_depth(backbone) == (SIZES | {'deit': SIZES['vit']})[family][size]
    hooks = [hook.type for hook in cfg.get('custom_hooks', [])]
    assert hooks == ['mmdynsparse.SinglePathSearchHook'] * is_search
    assert bool(backbone.pruning.get('search')) == is_search
    assert ('constructor' in cfg.optim_wrapper) == is_search
    own_weights = is_search or 'finetune' in name
    assert backbone.pruning.get('norm_identity', False) == (not own_weights)
    assert bool(backbone.get('init_cfg')) == (not own_weights)
    schedule = re.sub(r'search-(\d+)e', r'finetune-\1e', name).replace('-search-', '-finetune-')
    _check_schedule(schedule, cfg)
    if 'upernet' in name:
        crop = tuple(int(side) for side in re.search(r'-(\d+)x(\d+)$', name).groups())
        assert cfg.model.data_preprocessor.size == crop
    if is_search:
        partner = name.replace('search', 'finetune')
        assert (path.parent / f'{partner}.py').is_file()


@pytest.mark.parametrize('path', ONE_STAGE, ids=[path.stem for path in ONE_STAGE])
def test_one_stage_detectors_differ_from_stock_in_sparse_parts(path):
    """The name says which parts are sparse; the dense form of the others is mmdetection's."""
    model, name = Config.fromfile(path).model, path.stem
    sparse = {key for key in ('backbone', 'neck', 'bbox_head') if 'sparsity' in model[key]}
    expected = dict(backbone='sparse-(r50|swin)', neck='sparse-fpn', bbox_head='sparse-head')
    assert sparse == {key for key, pattern in expected.items() if re.search(pattern, name)}
    ratio = {} if 'neck' in sparse else dict(keep_ratio=0.3)
    assert {**model.bbox_head.sparsity, 'cell_size': 8} == {**ratio, 'cell_size': 8}
    if path.name not in STOCK_ONE_STAGE:
        return
    expected = plain(stock_config('mmdet', STOCK_ONE_STAGE[path.name]).model.to_dict())
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = plain(dense_config(model).model)
    for backbone in (model['backbone'], expected['backbone']):
        for key in ('num_stages', 'out_indices', 'style'):
            backbone.pop(key, None)
    assert model == expected


@pytest.mark.parametrize('family', [*FAMILIES, 'one_stage', 'spvit'])
def test_readme_and_metafile_list_every_config(family):
    """The family's README links each config and the metafile names each, and nothing else."""
    folder = CONFIGS / family
    names = {path.name for path in FILES if path.parent == folder}
    readme = (folder / 'README.md').read_text(encoding='utf-8')
    assert set(re.findall(r'\]\(\./([^)]+\.py)\)', readme)) == names
    models = Config.fromfile(folder / 'metafile.yml').Models
    assert {Path(model.Config).name for model in models} == names
    assert {f'{model.Name}.py' for model in models} == names
