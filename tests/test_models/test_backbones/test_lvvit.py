"""LV-ViT against a reference in the published layout, and its published multiply-adds."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmdynsparse.analysis import count_macs
from mmdynsparse.models import SparseLVViT
from mmdynsparse.utils import convert_checkpoint

TINY = dict(embed_dims=32, num_layers=4, num_heads=4)
SPARSE = dict(keep_ratio=0.6)


class Reference(nn.Module):
    """LV-ViT of 64 x 64 images with the published names, written out without dropout."""

    def __init__(self, width=32, depth=4, heads=4, predictors=0):
        super().__init__()
        stem = dict(conv1=nn.Conv2d(3, 64, 7, 2, 3, bias=False), bn1=nn.BatchNorm2d(64))
        for i in (2, 3):
            stem[f'conv{i}'] = nn.Conv2d(64, 64, 3, 1, 1, bias=False)
            stem[f'bn{i}'] = nn.BatchNorm2d(64)
        self.patch_embed = nn.ModuleDict(dict(stem, proj=nn.Conv2d(64, width, 8, 8)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, width))
        self.blocks = nn.ModuleList(self.block(width) for _ in range(depth))
        self.score_predictor = nn.ModuleList(self.predictor(width) for _ in range(predictors))
        self.norm = nn.LayerNorm(width)
        self.head, self.aux_head = nn.Linear(width, 5), nn.Linear(width, 5)
        self.heads = heads

    @staticmethod
    def block(width):
        attn = dict(qkv=nn.Linear(width, 3 * width, bias=False), proj=nn.Linear(width, width))
        mlp = dict(fc1=nn.Linear(width, 3 * width), fc2=nn.Linear(3 * width, width))
        norms = dict(norm1=nn.LayerNorm(width), norm2=nn.LayerNorm(width))
        return nn.ModuleDict(dict(norms, attn=nn.ModuleDict(attn), mlp=nn.ModuleDict(mlp)))

    @staticmethod
    def predictor(width):
        first = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        widths = (width, width // 2, width // 4, 2)
        layers = [nn.Linear(widths[i], widths[i + 1]) for i in range(3)]
        last = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])
        return nn.ModuleDict(dict(in_conv=first, out_conv=last))

    def forward(self, x):
        for i in (1, 2, 3):
            x = F.relu(self.patch_embed[f'bn{i}'](self.patch_embed[f'conv{i}'](x)))
        x = self.patch_embed['proj'](x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1) + self.pos_embed
        for block in self.blocks:
            x = x + self.attention(block['norm1'](x), block['attn']) / 2
            hidden = F.gelu(block['mlp']['fc1'](block['norm2'](x)))
            x = x + block['mlp']['fc2'](hidden) / 2
        return self.norm(x)

    def attention(self, x, layers):
        b, t, c = x.shape
        parts = layers['qkv'](x).split(c, dim=2)
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in parts)
        weights = (q @ k.transpose(2, 3) / (c // self.heads) ** 0.5).softmax(3)
        return layers['proj']((weights @ v).transpose(1, 2).reshape(b, t, c))


@pytest.fixture
def reference(randomize):
    """Function that builds a reference, in eval mode, with random weights and statistics."""

    def build(**kwargs):
        model = randomize(Reference(**kwargs)).eval()
        for i in (1, 2, 3):
            norm = model.patch_embed[f'bn{i}']
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        return model

    return build


def sparse(**kwargs):
    return SparseLVViT(img_size=64, final_norm=True, **{**TINY, 'sparsity': SPARSE, **kwargs})


@pytest.mark.parametrize('execution', ['gather', 'masked'])
def test_keep_all_is_the_published_model(reference, execution):
    theirs = reference()
    ours = sparse(output_cls_token=True, sparsity=dict(keep_ratio=1.0)).eval()
    keys = ours.load_state_dict(convert_checkpoint(theirs.state_dict(), 'lvvit'), strict=False)
    assert keys.unexpected_keys == []
    assert all(k.startswith('predictors.') for k in keys.missing_keys)
    ours.execution = execution
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(x)
        ((maps, cls),) = ours(x)
    torch.testing.assert_close(cls, expected[:, 0], atol=1e-5, rtol=0)
    tokens = maps.flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens, expected[:, 1:], atol=1e-5, rtol=0)


def test_published_sparse_checkpoint(reference):
    """Every tensor of the published DynamicViT has its place but those of the two classifiers."""
    theirs = reference(predictors=3).state_dict()
    ours = sparse()
    converted = convert_checkpoint({'model': theirs}, 'dynamicvit')
    keys = ours.load_state_dict(converted)
    assert keys.missing_keys == keys.unexpected_keys == []
    assert len(converted) == len([name for name in theirs if 'head.' not in name])


@pytest.mark.parametrize('size', [(64, 64), (50, 97)])
@pytest.mark.parametrize('selector', ['topk', 'mass'])
def test_masked_is_gathered(size, selector, randomize):
    model = randomize(sparse(sparsity=dict(SPARSE, selector=selector))).eval()
    x, outs = torch.randn(3, 3, *size), []
    with torch.no_grad():
        for execution in ('masked', 'gather'):
            model.execution = execution
            outs.append(model(x)[0])
    assert 0 < model.decisions[0].mask.mean() < 1
    torch.testing.assert_close(*outs, atol=1e-5, rtol=0)
    assert outs[0].shape[2:] == tuple(-(-side // 16) for side in size)


M = dict(embed_dims=512, num_layers=20, num_heads=8)


@pytest.mark.parametrize(
    'kwargs, keep_ratio, published', [({}, 0.7, 4.6), ({}, 0.5, 3.7), (M, 0.7, 8.5)]
)
def test_multiply_adds_are_the_published_ones(kwargs, keep_ratio, published):
    """GMACs at 224 x 224 with a 1000-class head, cut off after one digit as published ones are."""
    model = SparseLVViT(**kwargs, sparsity=dict(keep_ratio=keep_ratio)).eval()
    places = {16: (4, 8, 12), 20: (5, 10, 15)}
    assert model.stage_locations(0) == places[len(model.layers)]
    assert model.keep_ratios == pytest.approx([keep_ratio**i for i in (1, 2, 3)])
    macs = count_macs(model, torch.randn(1, 3, 224, 224)) + 1000 * model.pos_embed.shape[2]
    assert macs // 1e8 / 10 == published


@pytest.mark.parametrize('kwargs', [{}, dict(norm_eval=True), dict(frozen_exclude=('layers',))])
def test_statistics_of_the_stem_change_only_where_it_learns(kwargs):
    model = sparse(**kwargs).train()
    before = model.patch_embed.bn3.running_mean.clone()
    model(torch.randn(2, 3, 64, 64))
    assert torch.equal(before, model.patch_embed.bn3.running_mean) == bool(kwargs)


def test_drop_path_drops_both_branches():
    model = sparse(drop_path_rate=0.999).train()
    x = torch.randn(2, 17, 32)
    assert torch.equal(model.layers[-1](x), x)
    assert not torch.equal(model.layers[0](x), x)


def test_bad_arguments():
    with pytest.raises(ValueError, match='patch_size must be an even number, got 15'):
        sparse(patch_size=15)
