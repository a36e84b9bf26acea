import copy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import register_parametrization

from mmdynsparse.analysis import count_macs
from mmdynsparse.models import SparseResNet, SparseResNetV1c, SparseResNetV1d
from mmdynsparse.models.backbones import resnet
from mmdynsparse.ops import cell_mask
from mmdynsparse.utils import convert_checkpoint

SPARSE = dict(keep_ratio=0.5)
DILATED = dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))
LOW_RANK = dict(type='mmdynsparse.LowRankFastPath', reduction=4)
GN = dict(norm_cfg=dict(type='GN', num_groups=4))
CONTEXT = dict(type='ContextBlock', ratio=0.25)
ATTENTION = dict(type='GeneralizedAttention', num_heads=4, attention_type='1111', kv_stride=2)
PLUGINS = [
    dict(cfg=ATTENTION, stages=(False, False, True, True), position='after_conv2'),
    dict(cfg=dict(CONTEXT, postfix='_a'), position='after_conv1'),
    dict(cfg=CONTEXT, stages=(False, True, True, True), position='after_conv3'),
]
DCN = dict(
    dcn=dict(type='DCNv2', deform_groups=2, fallback_on_stride=True),
    stage_with_dcn=(False, True, True, False),
)
SIZES = [(224, 224), (257, 383), (64, 320), (32, 40)]
# Library, its class, ours, arguments of both.
ORIGINALS = {
    'r18': ('mmdet', 'ResNet', SparseResNet, dict(depth=18)),
    'r34-mmseg': ('mmseg', 'ResNet', SparseResNet, dict(depth=34)),
    'r50': ('mmdet', 'ResNet', SparseResNet, dict(depth=50)),
    'r50-caffe': ('mmdet', 'ResNet', SparseResNet, dict(depth=50, style='caffe')),
    'r50-v1c': ('mmseg', 'ResNetV1c', SparseResNetV1c, dict(depth=50)),
    'r101-v1c-d8': (
        'mmseg',
        'ResNetV1c',
        SparseResNetV1c,
        dict(depth=101, contract_dilation=True, **DILATED),
    ),
    'r50-multi-grid': (
        'mmseg',
        'ResNetV1c',
        SparseResNetV1c,
        dict(depth=50, multi_grid=(1, 2, 4), **DILATED),
    ),
    'r152-v1d': ('mmseg', 'ResNetV1d', SparseResNetV1d, dict(depth=152)),
    'r50-v1d': ('mmdet', 'ResNetV1d', SparseResNetV1d, dict(depth=50)),
    'r18-avg-down': ('mmdet', 'ResNet', SparseResNet, dict(depth=18, avg_down=True)),
}
# With parts that only a dense stage may have.
DENSE = {
    'r50-gn': ('mmdet', 'ResNet', SparseResNet, dict(depth=50, **GN)),
    'r18-gn-mmseg': ('mmseg', 'ResNet', SparseResNet, dict(depth=18, **GN)),
    'r50-gn-ws-v1c': (
        'mmseg',
        'ResNetV1c',
        SparseResNetV1c,
        dict(depth=50, conv_cfg=dict(type='ConvWS'), **GN),
    ),
    'r50-plugins': ('mmdet', 'ResNet', SparseResNet, dict(depth=50, plugins=PLUGINS)),
    'r50-plugins-mmseg': ('mmseg', 'ResNet', SparseResNet, dict(depth=50, plugins=PLUGINS)),
    'r50-dcn': ('mmdet', 'ResNet', SparseResNet, dict(depth=50, **DCN)),
    'r50-dcn-v1c-mmseg': ('mmseg', 'ResNetV1c', SparseResNetV1c, dict(depth=50, **DCN)),
}


def tame(model):
    """Random norms with statistics as after training, so that activations stay near one."""
    for name, m in model.named_modules():
        if name.endswith('conv_offset'):
            nn.init.normal_(m.weight, std=0.1)
        if 'context_block' in name and isinstance(m, nn.Conv2d):
            nn.init.normal_(m.weight, std=0.1)
        if isinstance(m, _BatchNorm):
            last = name.endswith('bn3') or (name.endswith('bn2') and not hasattr(m, 'bn3'))
            nn.init.uniform_(m.weight, *((0.1, 0.3) if last else (0.5, 1.0)))
            nn.init.normal_(m.bias, std=0.1)
            nn.init.normal_(m.running_mean, std=0.1)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    return model


def original(name, **kwargs):
    library, cls, ours, args = (ORIGINALS | DENSE)[name]
    module = pytest.importorskip(f'{library}.models.backbones')
    # Narrower than the real ones, to be quick.
    args = dict(args, base_channels=16, stem_channels=16, **kwargs)
    model = tame(getattr(module, cls)(**copy.deepcopy(args)))  # they take parts out of configs
    model.eval()
    return model, ours, args


def tiny(cls=SparseResNet, depth=50, sparsity=SPARSE, **kwargs):
    sparsity = dict(sparsity, cell_size=(4, 4, 2, 2))
    return tame(cls(depth, sparsity=sparsity, **(dict(base_channels=16) | kwargs))).eval()


def max_diff(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize('name', ORIGINALS)
def test_keep_all_equals_the_original(name):
    dense, ours, args = original(name)
    model = ours(**args, sparsity=dict(keep_ratio=1.0)).eval()
    keys = model.load_state_dict(dense.state_dict(), strict=False)
    assert keys.unexpected_keys == []
    assert all(k.startswith('predictors.') for k in keys.missing_keys)
    for size in SIZES:
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = dense(x)
            for execution in ('gather', 'masked'):
                model.execution = execution
                assert max_diff(model(x), expected) <= 1e-5


@pytest.mark.parametrize('name', ORIGINALS | DENSE)
@torch.no_grad()
def test_without_sparsity_it_is_the_original(name):
    dense, ours, args = original(name)
    model = ours(**args).eval()
    model.load_state_dict(dense.state_dict())
    # In float64, because group norm magnifies rounding.
    x = torch.randn(2, 3, 97, 130, dtype=torch.float64)
    assert max_diff(model.double()(x), dense.double()(x)) <= 1e-9


@pytest.mark.parametrize(
    'file',
    [
        'gn/mask-rcnn_r50_fpn_gn-all_2x_coco.py',
        'gcnet/mask-rcnn_r50-syncbn-gcb-r4-c3-c5_fpn_1x_coco.py',
        'dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py',
        'dcnv2/faster-rcnn_r50-mdconv-group4-c3-c5_fpn_1x_coco.py',
        'empirical_attention/faster-rcnn_r50-attn1111-dcn_fpn_1x_coco.py',
    ],
)
def test_stock_configs_swap(file):
    mmdet = pytest.importorskip('mmdet.models')
    cfg = Config.fromfile(Path(mmdet.__file__).parents[1] / '.mim/configs' / file).model.backbone
    cfg.pop('init_cfg')
    theirs = MODELS.build(dict(copy.deepcopy(cfg), type='mmdet.ResNet'))
    ours = MODELS.build(dict(cfg, type='mmdynsparse.SparseResNet'))
    ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize('name', ['r50', 'r18', *DENSE])
@pytest.mark.parametrize('norm_eval', [False, True])
def test_keep_all_in_training_equals_the_original(name, norm_eval):
    dense, ours, args = original(name, norm_eval=norm_eval)
    model = ours(**args, sparsity=dict(keep_ratio=1.0))
    model.load_state_dict(dense.state_dict(), strict=False)
    # In float64, because norms over a few positions magnify rounding.
    dense.double(), model.double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    dense.train()
    assert max_diff(model.train()(x), dense(x)) <= 1e-9
    for key, value in dense.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, atol=1e-9, rtol=0)


@pytest.mark.parametrize('depth', [18, 50])
@pytest.mark.parametrize('fast_path', [None, LOW_RANK])
@pytest.mark.parametrize(
    'kwargs', [{}, DILATED, dict(DILATED, multi_grid=(1, 2, 4), depth=50), dict(style='caffe')]
)
def test_masked_equals_gathered(depth, fast_path, kwargs, randomize):
    model = tiny(**(dict(depth=depth, sparsity=dict(SPARSE, fast_path=fast_path)) | kwargs))
    randomize(model.predictors)
    for name, p in model.named_parameters():
        if 'fast_path' in name:
            nn.init.normal_(p, std=0.05)
    x = torch.randn(3, 3, 129, 203)
    outs = []
    with torch.no_grad():
        for execution in ('masked', 'gather'):
            model.execution = execution
            outs.append(model(x))
    assert all(0.4 < d.mask.mean() <= 0.5 for d in model.decisions)
    assert max_diff(*outs) <= 1e-5


def test_dropped_cells_stay_as_they_are(monkeypatch):
    """Block by block, for a decision of which every position is known."""
    model = tiny(sparsity=dict(SPARSE, locations={1: (1,)}), out_indices=(1,))
    inputs = []
    model.layer2[0].register_forward_hook(lambda m, args, out: inputs.append(out))
    with torch.no_grad():
        (out,) = model(torch.randn(2, 3, 100, 140))
    (decision,) = model.decisions
    kept = cell_mask(decision.mask, tuple(out.shape[2:]), 4).expand_as(out) > 0
    assert torch.equal(out[~kept], inputs[0][~kept])
    assert not torch.equal(out[kept], inputs[0][kept])


def test_above_the_break_even_execution_is_masked(monkeypatch):
    model = tiny(sparsity=dict(keep_ratio=0.9))
    called = []
    monkeypatch.setattr(resnet, 'in_cells', lambda x, *args, **kwargs: called.append(1) or x)
    with torch.no_grad():
        model(torch.randn(1, 3, 256, 256))
        assert called == []
        model.set_keep_ratio(0.5)
        model(torch.randn(1, 3, 256, 256))
    assert len(called) == 3


def test_multiply_adds_follow_the_kept_cells():
    """Kept cells cost the branch and a border of its first layer, dropped ones nothing."""
    model = SparseResNet(50, sparsity=dict(keep_ratio=1.0)).eval()
    x = torch.randn(1, 3, 512, 512)
    dense = count_macs(model, x)
    # 10 bottlenecks of 17 p^2 multiply-adds a position; of these 4 in the first layer.
    block = 17 * 64**2 * 128**2
    model.set_keep_ratio(0.5)
    saved = dense - count_macs(model, x)
    assert 0.75 * 5 * block < saved < 5 * block


@pytest.mark.parametrize('cell_size, channels', [(8, 512), (4, 1024), (4, 2048)])
def test_predictor_costs_at_most_5_percent_of_a_block(cell_size, channels):
    from mmdynsparse.layers import CellPredictor

    cells, positions = 16, 16 * cell_size**2
    cost = count_macs(CellPredictor(channels), torch.randn(1, cells, channels))
    assert cost <= 0.05 * 17 * (channels // 4) ** 2 * positions


def test_names_of_other_code_bases():
    timm = pytest.importorskip('timm')
    x = torch.randn(1, 3, 96, 96)
    for name, cls in dict(resnet18=SparseResNet, resnet50d=SparseResNetV1d).items():
        theirs = tame(timm.create_model(name, features_only=True, out_indices=(1, 2, 3, 4))).eval()
        ours = cls(18 if name == 'resnet18' else 50).eval()
        ours.load_state_dict(convert_checkpoint(theirs.state_dict(), 'timm'))
        with torch.no_grad():
            assert max_diff(ours(x), theirs(x)) <= 1e-5
    torchvision = pytest.importorskip('torchvision').models.resnet18()
    state = convert_checkpoint(torchvision.state_dict(), 'torchvision')
    SparseResNet(18).load_state_dict(state)


@pytest.mark.parametrize('frozen', [-1, 0, 1, 3])
@pytest.mark.parametrize('out_indices', [(2,), (0, 1, 2, 3)])
def test_frozen_and_unused_stages_have_no_gradient(frozen, out_indices):
    model = tiny(frozen_stages=frozen, out_indices=out_indices)
    assert model.train() is model
    assert model.conv1.training == model.conv1.weight.requires_grad == (frozen < 0)
    for i, stage in enumerate(model.stages):
        assert stage.training == stage[0].bn1.training == (i >= frozen)
        learns = frozen <= i <= max(out_indices)
        assert all(p.requires_grad == learns for p in stage.parameters())
    outs = model(torch.randn(2, 3, 64, 64))
    if frozen <= max(out_indices):
        sum(out.sum() for out in outs).backward()
    assert all(p.requires_grad == (p.grad is not None) for p in model.parameters())


def test_dense_parts_and_sparse_stages():
    """A stage may have what cannot be sparse if it keeps everything."""
    args = dict(DCN, stage_with_dcn=(False, False, True, True), base_channels=16, depth=50)
    plugins = [dict(cfg=CONTEXT, stages=(True, False, False, True), position='after_conv3')]
    sparse = dict(cell_size=(4, 4, 2, 2))
    model = SparseResNet(**args, plugins=plugins, sparsity=dict(sparse, keep_ratio=(0.5, 1.0, 1.0)))
    tame(model).eval()
    outs = []
    with torch.no_grad():
        for execution in ('masked', 'gather'):
            model.execution = execution
            torch.manual_seed(1)
            outs.append(model(torch.randn(2, 3, 97, 130)))
    assert [d.mask.mean() < 1 for d in model.decisions] == [True, False, False]
    assert max_diff(*outs) <= 1e-5
    model.set_keep_ratio([0.3, 1.0, 1.0])
    model(torch.randn(1, 3, 64, 64))
    model.set_keep_ratio([0.3, 0.5, 1.0])
    for execution in ('masked', 'gather'):
        model.execution = execution
        with pytest.raises(ValueError, match=r'stage 2 must have .* got ModulatedDeformConv2dPack'):
            model(torch.randn(1, 3, 64, 64))


def test_parts_keep_their_own_start():
    args = dict(DCN, plugins=PLUGINS, base_channels=16)
    torch.manual_seed(1)
    model = SparseResNet(50, **args)
    for p in model.parameters():
        nn.init.normal_(p)
    model.init_weights()
    assert model.layer3[1].conv2.conv_offset.weight.abs().max() == 0
    model = SparseResNet(50, base_channels=16, **GN)
    for p in model.parameters():
        nn.init.normal_(p)
    model.init_weights()
    assert model.gn1.weight.min() == model.layer1[0].gn1.weight.min() == 1
    assert model.layer1[0].gn3.weight.abs().max() == 0


class Adapted(nn.Conv2d):
    """A convolution with a second one beside it, as LoRA has."""

    def forward(self, x):
        return super().forward(x) + self._conv_forward(x, self.weight.flip(0), None)


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def adapt(block, name):
    getattr(block, name).__class__ = Adapted


def hook(block, name):
    getattr(block, name).register_forward_hook(lambda module, args, out: 2 * out)


def parametrize(block, name):
    register_parametrization(getattr(block, name), 'weight', Double())


LAYERS = {18: ('conv1', 'conv2', 'bn1', 'bn2'), 50: ('conv1', 'conv2', 'conv3', 'bn2', 'bn3')}
CHANGED = [
    (depth, change, name)
    for depth, names in LAYERS.items()
    for change, changed in (
        (adapt, [name for name in names if 'conv' in name]),
        (parametrize, names),
        (hook, (*names, 'block')),
    )
    for name in changed
]


@pytest.mark.parametrize(('depth', 'change', 'name'), CHANGED)
@pytest.mark.parametrize('dilation', [1, 2])
@torch.no_grad()
def test_adapters_and_hooks_count(depth, change, name, dilation):
    args = dict(base_channels=16, strides=(1, 2, 1, 1), dilations=(1, 1, dilation, dilation))
    theirs = pytest.importorskip('mmdet.models.backbones').ResNet(depth, stem_channels=16, **args)
    model = tiny(depth=depth, sparsity=dict(SPARSE, selector='random'), **args)
    tame(theirs).eval()  # which returns None
    model.load_state_dict(theirs.state_dict(), strict=False)
    x = torch.randn(2, 3, 97, 130)

    def forward(ratio, execution):
        model.set_keep_ratio(ratio)
        model.execution = execution
        torch.manual_seed(1)
        return model(x)

    before = forward(0.5, 'gather')
    for stage in (model.layer3, theirs.layer3):
        change(*((stage, '1') if name == 'block' else (stage[1], name)))
    gathered = forward(0.5, 'gather')
    assert max_diff(gathered[2:], before[2:]) > 1e-3
    assert max_diff(gathered, forward(0.5, 'masked')) <= 2e-5
    assert max_diff(forward(1.0, 'gather'), theirs(x)) <= 2e-5


@pytest.mark.parametrize('part', ['stem', 'stem.0', 'layer2.0.downsample', 'layer2.0.downsample.1'])
@torch.no_grad()
def test_hooks_on_what_is_always_dense_count(part):
    theirs, cls, args = original('r50-v1d')
    model = cls(**args).eval()
    model.load_state_dict(theirs.state_dict())
    for m in (theirs, model):
        m.get_submodule(part).register_forward_hook(lambda module, args, out: 1.5 * out)
    x = torch.randn(1, 3, 64, 64)
    assert max_diff(model(x), theirs(x)) <= 2e-5


def test_norm_eval_keeps_the_statistics():
    model = tiny(norm_eval=True).train()
    before = model.layer4[1].bn2.running_mean.clone()
    model(torch.randn(2, 3, 64, 64))
    assert model.layer4.training and not model.layer4[1].bn2.training
    assert torch.equal(model.layer4[1].bn2.running_mean, before)


@pytest.mark.parametrize('depth', [18, 50])
def test_initial_blocks_are_the_identity(depth):
    model = SparseResNet(depth, base_channels=16)
    model.init_weights()
    for stage in model.stages:
        norm = stage[1].bn3 if depth == 50 else stage[1].bn2
        assert norm.weight.abs().max() == 0 and stage[1].bn1.weight.min() == 1
    model = SparseResNet(depth, base_channels=16, zero_init_residual=False)
    model.init_weights()
    assert model.layer1[1].bn2.weight.min() == 1


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(depth=20), 'depth must be one of .*got 20'),
        (dict(style='torch'), "style must be 'pytorch' or 'caffe', got 'torch'"),
        (dict(num_stages=5), 'num_stages must be in 1 to 4, got 5'),
        (dict(strides=(1, 2, 2)), r'strides must have num_stages = 4 values, got \(1, 2, 2\)'),
        (dict(dilations=(1,)), 'dilations must have num_stages = 4 values'),
        (dict(multi_grid=(1, 2)), r'multi_grid must have 3 values.*got \(1, 2\)'),
        (DCN, r'stage 1 must have .* \(no conv_cfg, dcn or plugins\).* got ModulatedDeform.* 0\.5'),
        (dict(DCN, stage_with_dcn=(True,)), 'stage_with_dcn must have num_stages = 4 values'),
        (dict(DCN, depth=18), "dcn and plugins need a depth of 50 or more, got {'type': 'DCNv2'"),
        (dict(plugins=PLUGINS), 'stage 1 must have .* to be sparse, .* got ContextBlock'),
        (dict(plugins=PLUGINS, depth=18), 'dcn and plugins need a depth of 50 or more, got'),
        (dict(plugins=[PLUGINS[2]] * 2), 'must have different postfixes, got context_block twice'),
        (dict(plugins=[dict(cfg=CONTEXT, position='last')]), "position of .*conv3'.*, got 'last'"),
        (dict(conv_cfg=dict(type='ConvWS')), 'stage 1 must have plain .* got ConvWS2d and 0.5'),
        (GN, 'stage 1 must have .* batch norms with running statistics .* got GroupNorm and 0.5'),
        (dict(norm_cfg=dict(type='BN', track_running_stats=False)), 'got BatchNorm2d and 0.5'),
        (dict(sparsity=dict(SPARSE, attention=True)), 'attention must be False .* got True'),
        (dict(sparsity=dict(SPARSE, locations={1: (0,)})), r'locations\[1\] takes blocks .*\(0,\)'),
        (dict(out_indices=(0, 4)), r'out_indices must be in 0 to 3, got \(0, 4\)'),
        (dict(frozen_stages=5), 'frozen_stages must be in -1 to 4, got 5'),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SparseResNet(**{'depth': 50, 'base_channels': 16, 'sparsity': SPARSE, **kwargs})
