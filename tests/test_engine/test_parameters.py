import pytest
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from torch import nn

from mmdynsparse.utils.checkpoints import is_new

SWIN = dict(
    type='mmdynsparse.SparseSwinTransformer',
    embed_dims=12,
    depths=(1, 1, 2, 1),
    num_heads=(1, 2, 4, 8),
    sparsity=dict(locations={2: (1,)}, keep_ratio=0.5),
)
CONVNEXT = dict(
    type='mmdynsparse.SparseConvNeXt',
    arch=dict(depths=(1, 1, 4, 1), channels=(8, 16, 24, 32)),
    sparsity=dict(locations={2: (1, 2)}, keep_ratio=0.5),
)


class Model(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = MODELS.build(backbone)
        self.head = nn.Linear(32, 2)


def build(backbone, **paramwise_cfg):
    """Return the learning rate and the weight decay of each parameter by name."""
    model = Model(backbone)
    cfg = dict(
        type='OptimWrapper',
        constructor='mmdynsparse.FineTuneOptimWrapperConstructor',
        optimizer=dict(type='AdamW', lr=0.1, weight_decay=0.5),
        paramwise_cfg=paramwise_cfg,
    )
    groups = build_optim_wrapper(model, cfg).optimizer.param_groups
    settings = {id(p): (g['lr'], g['weight_decay']) for g in groups for p in g['params']}
    assert len(settings) == sum(len(g['params']) for g in groups)
    return {name: settings[id(p)] for name, p in model.named_parameters()}


@pytest.mark.parametrize('backbone', [SWIN, CONVNEXT])
def test_rates_of_new_and_pretrained_parameters(backbone):
    settings = build(backbone, pretrained_lr_mult=0.1)
    assert sum(is_new(name) for name in settings) > 10
    for name, (lr, decay) in settings.items():
        assert lr == pytest.approx(0.1 if is_new(name) else 0.01), name
        assert decay == 0.5


def test_weight_decay_stays_that_of_the_other_rules():
    keys = {'norm': dict(decay_mult=0.0), 'head': dict(lr_mult=5.0)}
    settings = build(SWIN, pretrained_lr_mult=0.1, custom_keys=keys)
    for name, (lr, decay) in settings.items():
        assert decay == (0 if 'norm' in name else 0.5), name
        mult = 1 if is_new(name) else 0.5 if name.startswith('head') else 0.1
        assert lr == pytest.approx(0.1 * mult), name
    assert any(is_new(name) and 'norm' in name for name in settings)


def test_heads_may_be_new():
    settings = build(SWIN, pretrained_lr_mult=0.0, new_parts=['.predictors.', 'head.'])
    assert {name for name, (lr, _) in settings.items() if lr} == {
        name for name in settings if '.predictors.' in name or name.startswith('head.')
    }


@pytest.mark.parametrize('scope', ['mmseg', 'mmdet'])
def test_layer_decay_with_new_parameters_at_the_full_rate(scope):
    init_default_scope(scope)
    try:
        arguments = dict(decay_rate=0.9, decay_type='stage_wise', num_layers=6)
        settings = build(CONVNEXT, constructor='LearningRateDecayOptimizerConstructor', **arguments)
    finally:
        DefaultScope._instance_dict.clear()
    fast_paths = [lr for name, (lr, _) in settings.items() if '.fast_path.' in name]
    assert fast_paths and set(fast_paths) == {0.1}
    block = settings['backbone.stages.2.3.pointwise_conv1.weight']
    # Stage 3 has layer 3 of 8, so four factors of 0.9 are left.
    assert block == (pytest.approx(0.1 * 0.9**4), 0.5)
    assert settings['backbone.stages.2.3.pointwise_conv1.bias'][1] == 0


@pytest.mark.parametrize(
    'arguments, match',
    [
        (dict(pretrained_lr_mult=1.5), r'pretrained_lr_mult must be in \[0, 1\], got 1.5'),
        (dict(new_parts=['.none.']), r"new_parts must occur .* got \('.none.',\)"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        build(SWIN, **arguments)


def test_no_learning_rate():
    cfg = dict(
        constructor='mmdynsparse.FineTuneOptimWrapperConstructor', optimizer=dict(type='AdamW')
    )
    with pytest.raises(ValueError, match='lr must be given'):
        build_optim_wrapper(Model(SWIN), cfg)


def test_gates_have_a_group_of_their_own():
    backbone = {k: v for k, v in SWIN.items() if k != 'sparsity'}
    settings = build(dict(backbone, pruning=dict(search=True)), pretrained_lr_mult=0.1)
    gates = {name for name in settings if 'gate_logits' in name}
    assert len(gates) == 10
    for name, setting in settings.items():
        lr = 0.1 if is_new(name) else 0.01
        assert setting == pytest.approx((lr, 0.0 if name in gates else 0.5)), name
