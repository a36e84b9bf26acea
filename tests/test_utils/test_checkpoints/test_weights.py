import pytest
import torch
from torch import nn

from mmdynsparse.models import SparseResNet, SparseSwinTransformer
from mmdynsparse.utils.checkpoints import check_backbone, check_weights


class Model(torch.nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone


def swin(third=4, **kwargs):
    kwargs = dict(sparsity=dict(keep_ratio=0.7, locations={2: (1,)}), window_size=7) | kwargs
    depths, heads = (1, 1, third, 1), (1, 2, 4, 8)
    return Model(SparseSwinTransformer(embed_dims=8, depths=depths, num_heads=heads, **kwargs))


def resnet(depth, **kwargs):
    return Model(SparseResNet(depth=depth, base_channels=4, stem_channels=4, **kwargs))


@pytest.mark.parametrize(
    'ours, theirs, fault',
    [
        (lambda: swin(4), lambda: swin(2), r'26 missing keys \(backbone.stages.2.blocks.2'),
        (lambda: swin(2), lambda: swin(4), r'26 unexpected keys \(backbone.stages.2.blocks.2'),
        (lambda: resnet(101), lambda: resnet(50), r'255 missing keys \(backbone.layer3.6.conv1'),
        (lambda: resnet(50), lambda: resnet(101), r'255 unexpected keys \(backbone.layer3.6.conv1'),
    ],
)
def test_a_backbone_of_another_depth_is_refused(ours, theirs, fault):
    with pytest.raises(ValueError, match=rf'load_from must hold .*, got {fault}.*, \.\.\.\)$'):
        check_backbone(ours(), theirs().state_dict())


def test_a_backbone_of_another_width_is_refused():
    weights = swin().state_dict()
    name = 'backbone.stages.3.blocks.0.ffn.layers.1.weight'
    with pytest.raises(ValueError, match=rf'got 1 keys of another shape \({name}\)'):
        check_backbone(swin(), weights | {name: weights[name][:, :8]})


OTHER = dict(keep_ratio=0.5, locations={1: (0,), 3: (0,)})


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(),
        dict(sparsity=None),
        dict(sparsity=OTHER),
        dict(out_indices=(1, 3)),
        dict(out_indices=(0, 1, 2, 3), window_size=5),
        dict(frozen_stages=2),
    ],
)
@pytest.mark.parametrize('sparsity', [None, OTHER])
def test_the_same_backbone_is_taken(kwargs, sparsity):
    """With other sparse parts, outputs and windows, classifiers and heads, wrapped or not."""
    weights = swin(sparsity=sparsity, out_indices=(0, 3)).state_dict()
    weights |= {
        'head.fc.weight': torch.zeros(2),
        'backbone.fc.weight': torch.zeros(2),
        'backbone.stages.0.blocks.0.attn_mask': torch.zeros(2),
    }
    check_backbone(swin(**kwargs), weights)
    check_backbone(swin(**kwargs), {f'module.{key}': value for key, value in weights.items()})


def test_norms_without_a_count_of_batches():
    weights = resnet(50).state_dict()
    weights = {key: value for key, value in weights.items() if 'num_batches' not in key}
    check_backbone(resnet(50, out_indices=(1,), frozen_stages=1), weights)


# --- check_weights -------------------------------------------------------------------------------


class Block(nn.Module):
    """A layer with the submodules that a sparse backbone, and a neck or head, add."""

    def __init__(self, sparse: bool, keep_ratios: tuple[float, ...]) -> None:
        super().__init__()
        self.keep_ratios = keep_ratios
        self.ffn = nn.Linear(2, 2)
        if sparse:
            self.predictors = nn.ModuleList([nn.Linear(2, 2)])
            self.fast_path = nn.Linear(2, 2)
            self.predictor = nn.Linear(2, 2)


def model(sparse: bool, *keep_ratios: float) -> nn.Module:
    """Returns a model with one block, named as in a segmentor."""
    return nn.ModuleDict({'backbone': Block(sparse, keep_ratios), 'norm': nn.BatchNorm1d(2)})


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_weights_that_fit(prefix: str) -> None:
    source, target = model(True), model(True)
    weights = {prefix + key: value for key, value in source.state_dict().items()}
    check_weights(target, weights, 'x.pth')
    assert torch.equal(target['backbone'].ffn.weight, source['backbone'].ffn.weight)


@pytest.mark.parametrize(('into', 'kind'), [(True, 'missing'), (False, 'unexpected')])
def test_sparse_parts_are_needed_unless_dense(into: bool, kind: str) -> None:
    weights = model(not into).state_dict()
    for ratios in ((0.7,), (1.0, 0.9)):
        with pytest.raises(ValueError, match=rf'6 {kind} keys \(backbone.*predictors'):
            check_weights(model(into, *ratios), weights, 'x.pth')
    for ratios in ((), (1.0, 1)):
        check_weights(model(into, *ratios), weights, 'x.pth')


def test_weights_of_another_shape() -> None:
    weights = model(True).state_dict()
    weights['backbone.ffn.bias'] = torch.zeros(3)
    with pytest.raises(ValueError, match=r'1 keys of another shape \(backbone\.ffn\.bias\)'):
        check_weights(model(True), weights, 'x.pth')
