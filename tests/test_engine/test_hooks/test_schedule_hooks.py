import pytest
import torch
from mmengine.hooks import Hook

from mmdynsparse.engine import FreezePretrained, KeepRatioSchedule, TemperatureSchedule
from mmdynsparse.engine.hooks import sparsity_hook


class Watch(Hook):
    """Records keep ratios and temperature of every iteration, and copies of all parameters."""

    def __init__(self):
        self.ratios, self.temperatures, self.weights = [], [], []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.ratios.append([d.ratio for d in runner.model.backbone.decisions])
        self.temperatures.append(runner.model.backbone.temperature)
        copies = {k: v.detach().clone() for k, v in runner.model.named_parameters()}
        self.weights.append(copies)


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_keep_ratio_falls_linearly_from_one(training):
    watch = Watch()
    run = training(dict(type='mmdynsparse.KeepRatioSchedule', begin=1, end=4), watch, iters=6)
    for i, ratios in enumerate(watch.ratios):
        p = min(max((i - 1) / 3, 0), 1)
        assert ratios == pytest.approx([1 - p * (1 - r) for r in (0.7, 0.5, 0.3)], abs=1e-6)
    assert watch.ratios[4] == [0.7, 0.5, 0.3] == run.model.backbone.keep_ratios
    assert run.model.backbone.extra_kept == 0
    assert run.log[0]['keep_rate_2'] == 1


def test_validation_is_at_the_ratios_of_the_model(training):
    """Else the checkpoint with the best metric would be an early one, which is nearly dense."""

    class WatchValidation(Watch):
        def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            self.ratios.append([d.ratio for d in runner.model.backbone.decisions])

    watch = WatchValidation()
    loop = dict(type='IterBasedTrainLoop', max_iters=3, val_interval=2)
    hook = KeepRatioSchedule(begin=1, end=3)
    training(hook, watch, iters=3, train_cfg=loop)
    ones, halfway = [1, 1, 1], [0.85, 0.75, 0.65]
    assert watch.ratios[:4] == [ones, ones, [0.7, 0.5, 0.3], halfway]


def test_predictors_learn_their_ratios_while_more_is_kept(training):
    """They need not unlearn to keep everything, and the keep rates fall as they should."""
    run = training(KeepRatioSchedule(begin=0, end=150), iters=150)
    own = [d.scores.exp().mean().item() for d in run.model.backbone.decisions]
    assert own == pytest.approx([0.7, 0.5, 0.3], abs=0.1)
    for begin, share in ((30, 0.3), (70, 0.57), (110, 0.83)):
        lines = run.log[begin : begin + 30]
        rates = [sum(line[f'keep_rate_{i}'] for line in lines) / 30 for i in range(3)]
        expected = [1 - share * (1 - ratio) for ratio in (0.7, 0.5, 0.3)]
        assert rates == pytest.approx(expected, abs=0.1)


def test_temperature_changes_linearly(training):
    watch = Watch()
    training(TemperatureSchedule(5.0, 1.0, begin=1, end=3), watch, iters=5)
    assert watch.temperatures == [5.0, 5.0, 3.0, 1.0, 1.0]


def test_pretrained_parameters_are_frozen_at_first(training):
    watch = Watch()
    run = training(FreezePretrained(iters=2), watch, iters=4)
    names = set(watch.weights[0])
    new = {name for name in names if 'predictors' in name or 'fast_path' in name}
    assert new and changed(*watch.weights[:2]) == new
    # AdamW also decays, so every parameter changes once it is not frozen.
    assert names - new <= changed(*watch.weights[1:3])
    assert not run.runner.optim_wrapper.optimizer._optimizer_step_pre_hooks


def test_freezing_with_accumulated_gradients(training):
    watch = Watch()
    wrapper = dict(optimizer=dict(type='AdamW', lr=0.002), accumulative_counts=2)
    training(FreezePretrained(iters=2), watch, iters=4, optim_wrapper=wrapper)
    assert all('predictors' in n or 'fast_path' in n for n in changed(*watch.weights[0:2]))
    assert changed(*watch.weights[0:2]) and not changed(*watch.weights[1:3])
    assert len(changed(*watch.weights[2:4])) == len(watch.weights[0])


def test_resume_restores_all_schedules(training):
    def hooks(watch):
        return (
            KeepRatioSchedule(begin=1, end=5),
            TemperatureSchedule(4.0, 1.0, end=4),
            FreezePretrained(iters=3),
            watch,
        )

    full, first, rest = Watch(), Watch(), Watch()
    training(*hooks(full), folder='full', iters=6)
    # The first half is a training of the same length that stops at its checkpoint.
    stop = Stop(2)
    training(*hooks(first), stop, folder='halves', iters=6)
    training(*hooks(rest), folder='halves', iters=6, resume=True)
    assert first.ratios + rest.ratios == full.ratios
    assert first.temperatures + rest.temperatures == full.temperatures
    assert len(rest.weights) == 4
    new = changed(first.weights[-1], rest.weights[0])
    assert new and all('predictors' in n or 'fast_path' in n for n in new)
    assert len(changed(rest.weights[0], rest.weights[1])) == len(rest.weights[0])


class Stop(Hook):
    """Ends a training after some iterations."""

    priority = 'LOWEST'

    def __init__(self, iters):
        self.iters = iters

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        runner.train_loop.stop_training = runner.iter + 1 == self.iters


def test_resume_with_other_keep_ratios_is_warned_of(training, warnings_of):
    texts = warnings_of(sparsity_hook)
    training(KeepRatioSchedule(begin=1, end=8), Stop(2), iters=8)
    again = dict(iters=3, resume=True)
    training(KeepRatioSchedule(begin=1, end=3), **again)
    assert not any('resumed' in text for text in texts)
    model = training.__globals__['Model'](keep_ratio=0.9)
    training(**again | dict(model=model, iters=4))
    (text,) = [text for text in texts if 'resumed' in text]
    assert '[0.7, 0.5, 0.3]' in text and '[0.9, 0.7, 0.5]' in text


@pytest.mark.parametrize(
    'hook, arguments, match',
    [
        (KeepRatioSchedule, dict(begin=3, end=3), 'begin < end, got 3 and 3'),
        (KeepRatioSchedule, dict(begin=-1, end=3), 'got -1 and 3'),
        (TemperatureSchedule, dict(start=0, stop=1, end=3), 'start must be above 0, got 0'),
        (TemperatureSchedule, dict(start=1, stop=-1, end=3), 'stop must be above 0, got -1'),
        (FreezePretrained, dict(iters=0), 'iters must be above 0, got 0'),
    ],
)
def test_bad_arguments(hook, arguments, match):
    with pytest.raises(ValueError, match=match):
        hook(**arguments)


@pytest.mark.parametrize(
    'hook, argument',
    [
        (KeepRatioSchedule(begin=1, end=5), 'end of KeepRatioSchedule'),
        (TemperatureSchedule(2, 1, end=5), 'end of TemperatureSchedule'),
        (FreezePretrained(5), 'iters of FreezePretrained'),
    ],
)
def test_longer_than_the_training(hook, argument, training):
    with pytest.raises(ValueError, match=f"{argument} must be at most the training's 4 .*got 5"):
        training(hook)


def test_nothing_to_schedule(training):
    with pytest.raises(ValueError, match=r"new_parts must occur .* got \('nothing',\)"):
        training(FreezePretrained(1, new_parts=['nothing']))
