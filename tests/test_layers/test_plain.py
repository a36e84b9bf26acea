"""Adapters, hooks and wrappers around a layer have the effect that they have in the original."""

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmcv.cnn.bricks import transformer
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from mmdynsparse.layers import (
    FFN,
    LayerNorm2d,
    Linear,
    LinearFastPath,
    LocalGlobalPredictor,
    TokenMSA,
    conv_norm,
    is_plain,
    mlp_weights,
)
from mmdynsparse.layers.conv_module import conv_module, norm_act
from mmdynsparse.ops.kernels import fused_paths


class AdaptedLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) + x.sum(-1, keepdim=True)


class AdaptedConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + self._conv_forward(x, torch.ones_like(self.weight), None)


class Wrapper(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) + 0.5


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def adapt(parent, name):
    """Make a layer one of a subclass that adds something, as LoRA does."""
    layer = getattr(parent, name)
    layer.__class__ = AdaptedConv if isinstance(layer, nn.Conv2d) else AdaptedLinear


def wrap(parent, name):
    setattr(parent, name, Wrapper(getattr(parent, name)))


def hook(parent, name):
    getattr(parent, name).register_forward_hook(lambda module, args, out: 2 * out)


def pre_hook(parent, name):
    getattr(parent, name).register_forward_pre_hook(lambda module, args: args[0].square())


def parametrize(parent, name):
    register_parametrization(getattr(parent, name), 'weight', Double())


def override(parent, name):
    layer = getattr(parent, name)
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


CHANGES = [adapt, wrap, hook, pre_hook, parametrize, override]


def check(ours, theirs, before):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours, before, atol=1e-3), 'the change has no effect'


@pytest.mark.parametrize('change', CHANGES)
def test_is_plain(change):
    parent = nn.Sequential(nn.Linear(3, 4))
    assert is_plain(parent[0], Linear, nn.Linear) and not is_plain(parent[0], Linear)
    change(parent, '0')
    assert not is_plain(parent[0], Linear, nn.Linear)


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('index', [0, 1])
@torch.no_grad()
def test_ffn(change, index, randomize):
    theirs = transformer.FFN(8, 12, act_cfg=dict(type='GELU'), add_identity=False).eval()
    ours = FFN(8, 12, dict(type='GELU')).eval()
    ours.load_state_dict(randomize(theirs).state_dict())
    x = torch.randn(2, 5, 8)
    before = ours(x)
    for ffn in (ours, theirs):
        change(*((ffn.layers[0], '0') if index == 0 else (ffn.layers, '1')))
    check(ours(x), theirs(x), before)


@torch.no_grad()
def test_hook_on_the_activation_of_an_ffn(randomize):
    ffn = randomize(FFN(8, 12, dict(type='GELU'))).eval()
    (fc, _, _), last, _ = ffn.layers
    hook(ffn.layers[0], '1')
    x = torch.randn(5, 8)
    torch.testing.assert_close(ffn(x), last(2 * F.gelu(fc(x))), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('name', ['fc_in', 'fc1', 'fc2', 'fc3'])
@torch.no_grad()
def test_predictor(change, name, randomize):
    predictor = randomize(LocalGlobalPredictor(8), std=1.0)
    x = torch.randn(2, 5, 8)
    before = predictor(x)
    change(predictor, name)
    h = F.gelu(predictor.fc_in(predictor.norm(x)))
    h = torch.cat((h[..., :4], h[..., 4:].mean(1, keepdim=True).expand(-1, 5, -1)), -1)
    h = predictor.fc3(F.gelu(predictor.fc2(F.gelu(predictor.fc1(h)))))
    if name == 'fc3' and change in (adapt, wrap):  # both classes get the same more
        before = before + 1
    check(predictor(x), h.log_softmax(-1), before)


@pytest.mark.parametrize('change', CHANGES)
@torch.no_grad()
def test_fast_path(change, randomize):
    path = randomize(LinearFastPath(8))
    x = torch.randn(5, 8)
    before = path(x)
    change(path, 'fc')
    check(path(x), path.fc(F.layer_norm(x, (8,), *path.norm.parameters())), before)


@pytest.mark.parametrize('change', CHANGES)
@torch.no_grad()
def test_output_of_attention(change, randomize):
    attn = randomize(TokenMSA(8, 2)).eval()
    x = torch.randn(2, 5, 8)
    heads = []
    handle = attn.attn.out_proj.register_forward_pre_hook(lambda m, args: heads.append(args[0]))
    before = attn(x)
    handle.remove()
    change(attn.attn, 'out_proj')
    check(attn(x), attn.attn.out_proj(heads[0]), before)


@pytest.mark.parametrize('change', [hook, pre_hook, override])
@torch.no_grad()
def test_layer_norm_of_maps(change, randomize):
    parent = nn.Sequential(randomize(LayerNorm2d(8)))
    x = torch.randn(2, 8, 3, 4)
    before = parent(x)
    change(parent, '0')
    check(parent[0].over_last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), parent(x), before)


class Pair(nn.Module):
    """A convolution and its norm, in eval mode."""

    def __init__(self, dilation=1):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=dilation, dilation=dilation, bias=False)
        self.norm = nn.BatchNorm2d(6)
        nn.init.normal_(self.norm.running_mean)
        self.eval()

    def forward(self, x):
        return self.norm(self.conv(x))


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('name', ['conv', 'norm'])
@pytest.mark.parametrize('dilation', [1, 2])
@torch.no_grad()
def test_conv_norm(change, name, dilation):
    if name == 'norm' and change is adapt:
        pytest.skip('adapters are for linear layers and convolutions')
    pair, x = Pair(dilation), torch.randn(1, 4, 30, 30)
    before = conv_norm(x, pair.conv, pair.norm)
    change(pair, name)
    check(conv_norm(x, pair.conv, pair.norm), pair(x), before)
    inner = (..., slice(dilation, -dilation), slice(dilation, -dilation))
    check(conv_norm(x, pair.conv, pair.norm, dilation), pair(x)[inner], before[inner])


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('norm', [None, dict(type='BN')])
@pytest.mark.parametrize('name', ['conv', 'activate', 'module'])
@torch.no_grad()
def test_conv_module(change, norm, name):
    parent = nn.Sequential(ConvModule(4, 6, 3, padding=1, norm_cfg=norm)).eval()
    if name == 'activate' and change in (adapt, parametrize):
        pytest.skip('an activation has no weight')
    if name == 'module' and change in (adapt, wrap, parametrize):
        pytest.skip('what is in a ConvModule is adapted, not the module')
    x = torch.randn(1, 4, 30, 30)
    before = conv_module(parent[0], x)
    change(*((parent, '0') if name == 'module' else (parent[0], name)))
    check(conv_module(parent[0], x), parent(x), before)
    inner = (..., slice(1, -1), slice(1, -1))
    check(conv_module(parent[0], x, padding=0), parent(x)[inner], before[inner])


def test_light_path_calls_its_norm():
    module = ConvModule(4, 6, 1, norm_cfg=dict(type='BN'), act_cfg=None)
    x = torch.randn(2, 6, 5, 5, requires_grad=True)
    before = {k: v.clone() for k, v in module.norm.state_dict().items()}
    plain = norm_act(module, x, light=True)
    module.norm.register_forward_hook(lambda m, args, out: 2 * out)
    out = norm_act(module, x, light=True)
    module.norm.running_mean += 1  # as the slow path does before the backward pass
    out.sum().backward()
    torch.testing.assert_close(out, 2 * plain)
    module.norm.running_mean -= 1
    assert module.norm.training
    for name, value in before.items():
        assert torch.equal(module.norm.state_dict()[name], value)


def fused(ffn, norm, fast_path):
    x, rows = torch.randn(4, 8), torch.arange(4)
    return fused_paths(x, x, rows[:2], rows[2:], ffn.weights(norm), fast_path)


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize(
    ('part', 'message'),
    [
        ('fc1', 'the first linear layer must be Linear'),
        ('fc2', 'the second linear layer must be Linear'),
        ('norm', 'the norm must be LayerNorm'),
        ('act', 'the activation must be GELU'),
        ('fast_path', 'the fast path must be LinearFastPath'),
        ('fast_fc', "the fast path's linear layer must be Linear"),
        ('fast_norm', "the fast path's norm must be LayerNorm"),
    ],
)
def test_kernels_refuse_them(change, part, message):
    ffn, fast_path = FFN(8, 12, dict(type='GELU')), LinearFastPath(8)
    parent = nn.ModuleDict(dict(norm=nn.LayerNorm(8), fast_path=fast_path))
    places = dict(
        fc1=(ffn.layers[0], '0'),
        fc2=(ffn.layers, '1'),
        act=(ffn.layers[0], '1'),
        norm=(parent, 'norm'),
        fast_path=(parent, 'fast_path'),
        fast_fc=(fast_path, 'fc'),
        fast_norm=(fast_path, 'norm'),
    )
    if change in (adapt, parametrize) and not part.endswith(('fc1', 'fc2', 'fc')):
        pytest.skip('adapters are for linear layers and convolutions')
    parent, name = places[part]
    change(parent, name)
    norm = places['norm'][0]['norm']
    with pytest.raises(ValueError, match=f'{message}.*hooks or adapters|{message} or None'):
        fused(ffn, norm, places['fast_path'][0]['fast_path'])


def test_kernels_refuse_hooks_on_the_whole_ffn():
    ffn = FFN(8, 12, dict(type='GELU'))
    ffn.register_forward_hook(lambda m, args, out: 2 * out)
    with pytest.raises(ValueError, match='the FFN must be FFN for fused kernels, without hooks'):
        ffn.weights(nn.LayerNorm(8))


def test_kernels_take_the_exact_gelu_alone():
    args = (nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(approximate='tanh'), nn.Linear(12, 8))
    with pytest.raises(ValueError, match="exact, got GELU\\(approximate='tanh'\\)"):
        mlp_weights(*args)
