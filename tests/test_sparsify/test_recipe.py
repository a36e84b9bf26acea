"""The shortened training."""

import sys
from pathlib import Path

import pytest
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from stock import stock_path

from mmdynsparse.sparsify import draft_config
from mmdynsparse.sparsify.recipe import fine_tuning


@pytest.fixture
def model() -> nn.Module:
    """A detector without logits to compare, as far as the recipe looks at it."""
    model = nn.Module()
    model.neck = nn.Identity()
    return model


def test_a_tenth_of_the_schedule(model: nn.Module) -> None:
    """Of the dense 3x schedule it is configs/_base_/schedules/det_sparse-4e.py."""
    cfg = dict(
        train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=36, val_interval=1),
        param_scheduler=[
            dict(type='LinearLR', by_epoch=False, begin=0, end=1000),
            dict(type='MultiStepLR', by_epoch=True, begin=0, end=36, milestones=[27, 33]),
        ],
        optim_wrapper=dict(constructor='LearningRateDecayOptimizerConstructor'),
        custom_hooks=[dict(type='PipelineSwitchHook', switch_epoch=30)],
    )
    changes = fine_tuning(cfg, model)
    assert changes['train_cfg'] == dict(max_epochs=4, val_interval=1)
    warm_up, steps = changes['param_scheduler']
    assert warm_up['begin'] == 0 and warm_up['end'] == 111
    assert steps['end'] == 4 and steps['milestones'] == [3]
    paramwise_cfg = changes['optim_wrapper']['paramwise_cfg']
    assert paramwise_cfg['constructor'] == 'LearningRateDecayOptimizerConstructor'
    own, *ours = changes['custom_hooks']
    assert own == dict(type='PipelineSwitchHook', switch_epoch=3)
    assert [hook['type'] for hook in ours] == [
        'mmdynsparse.SparsityHook',
        'mmdynsparse.DistillationHook',
        'mmdynsparse.FreezePretrained',
    ]
    assert ours[1]['logit_weight'] == 0 and ours[1]['features'] == dict(neck=0.5)
    assert cfg['custom_hooks'][0]['switch_epoch'] == 30


def test_another_length(model: nn.Module) -> None:
    cfg = dict(
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=1500, val_interval=500),
        param_scheduler=[
            dict(type='LinearLR', by_epoch=False, begin=0, end=150),
            dict(type='PolyLR', by_epoch=False, begin=150, end=1500),
        ],
        custom_hooks=[dict(type='EMAHook', begin=750)],
    )
    changes = fine_tuning(cfg, model, length=200)
    assert changes['train_cfg'] == dict(max_iters=200, val_interval=67)
    assert [(s['begin'], s['end']) for s in changes['param_scheduler']] == [(0, 20), (20, 200)]
    assert changes['custom_hooks'][0]['begin'] == 100


def test_a_training_without_validation(model: nn.Module) -> None:
    cfg = dict(
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=400),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook')),
    )
    assert fine_tuning(cfg, model, length=160)['default_hooks']['checkpoint']['interval'] == 160


def test_schedulers_end_with_the_training(model: nn.Module) -> None:
    """Of YOLOX: warm-up, cosine and the last epochs."""
    schedulers = [
        dict(type='QuadraticWarmupLR', by_epoch=True, begin=0, end=5),
        dict(type='CosineAnnealingLR', by_epoch=True, begin=5, end=285, T_max=285),
        dict(type='ConstantLR', by_epoch=True, begin=285, end=300),
    ]
    cfg = dict(train_cfg=dict(max_epochs=300, val_interval=10), param_scheduler=schedulers)
    changes = fine_tuning(cfg, model)
    assert changes['train_cfg'] == dict(max_epochs=30, val_interval=1)
    ends = [(s['begin'], s['end']) for s in changes['param_scheduler']]
    assert ends == [(0, 1), (1, 28), (28, 30)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'weight'),
    [
        ('fcn/fcn_r50-d8_4xb4-160k_ade20k-512x512.py', 0.5),
        ('upernet/upernet_r18_4xb2-80k_cityscapes-512x1024.py', 5.0),
        ('encnet/encnet_r50-d8_4xb4-160k_ade20k-512x512.py', 0.0),
        ('knet/knet-s3_swin-t_upernet_8xb2-adamw-80k_ade20k-512x512.py', 0.0),
    ],
)
def test_only_maps_of_logits_are_distilled(name: str, weight: float) -> None:
    hooks = draft_config(str(stock_path('mmseg', name))).changes['custom_hooks']
    (hook,) = [hook for hook in hooks if hook['type'] == 'mmdynsparse.DistillationHook']
    assert hook['logit_weight'] == weight


def test_joint_training(model: nn.Module) -> None:
    cfg = dict(train_cfg=dict(max_iters=160000, val_interval=16000))
    changes = fine_tuning(cfg, model, joint=True)
    assert changes['train_cfg'] == dict(max_iters=16000, val_interval=1600)
    assert changes['custom_hooks'][0]['type'] == 'mmdynsparse.DenseSparseSchedule'


def test_config_without_a_training(model: nn.Module) -> None:
    with pytest.raises(ValueError, match='max_iters or max_epochs to be fine-tuned'):
        fine_tuning(dict(), model)
