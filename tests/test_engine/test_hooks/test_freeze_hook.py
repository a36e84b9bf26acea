import pytest
import torch
from mmengine.hooks import Hook

from mmdynsparse.engine import FreezePretrained


class Watch(Hook):
    """Records copies of all parameters after every iteration."""

    def __init__(self):
        self.weights = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        copies = {k: v.detach().clone() for k, v in runner.model.named_parameters()}
        self.weights.append(copies)


class Stop(Hook):
    """Ends a training after some iterations."""

    priority = 'LOWEST'

    def __init__(self, iters):
        self.iters = iters

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        runner.train_loop.stop_training = runner.iter + 1 == self.iters


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_pretrained_parameters_are_frozen_at_first(training):
    watch = Watch()
    run = training(FreezePretrained(iters=2), watch, iters=4)
    names = set(watch.weights[0])
    new = {name for name in names if 'predictors' in name or 'fast_path' in name}
    assert new and changed(*watch.weights[:2]) == new
    # AdamW also decays, so every parameter changes once it is not frozen.
    assert names - new <= changed(*watch.weights[1:3])
    assert not run.runner.optim_wrapper.optimizer._optimizer_step_pre_hooks


def test_a_share_of_the_training_is_frozen(training):
    watch = Watch()
    training(FreezePretrained(iters=0.5), watch, iters=4)
    assert all('predictors' in n or 'fast_path' in n for n in changed(*watch.weights[:2]))
    assert len(changed(*watch.weights[1:3])) == len(watch.weights[0])


def test_freezing_with_accumulated_gradients(training):
    watch = Watch()
    wrapper = dict(optimizer=dict(type='AdamW', lr=0.002), accumulative_counts=2)
    training(FreezePretrained(iters=2), watch, iters=4, optim_wrapper=wrapper)
    assert all('predictors' in n or 'fast_path' in n for n in changed(*watch.weights[0:2]))
    assert changed(*watch.weights[0:2]) and not changed(*watch.weights[1:3])
    assert len(changed(*watch.weights[2:4])) == len(watch.weights[0])


def test_resume_goes_on_frozen(training):
    first, rest = Watch(), Watch()
    # The first half is a training of the same length that stops at its checkpoint.
    training(FreezePretrained(iters=3), first, Stop(2), iters=6)
    training(FreezePretrained(iters=3), rest, iters=6, resume=True)
    assert len(rest.weights) == 4
    new = changed(first.weights[-1], rest.weights[0])
    assert new and all('predictors' in n or 'fast_path' in n for n in new)
    assert len(changed(rest.weights[0], rest.weights[1])) == len(rest.weights[0])


def test_bad_arguments():
    with pytest.raises(ValueError, match='iters must be above 0, got 0'):
        FreezePretrained(iters=0)


def test_longer_than_the_training(training):
    match = "iters of FreezePretrained must be at most the training's 4 .*got 5"
    with pytest.raises(ValueError, match=match):
        training(FreezePretrained(5))


def test_nothing_is_new(training):
    with pytest.raises(ValueError, match=r"new_parts must occur .* got \('nothing',\)"):
        training(FreezePretrained(1, new_parts=['nothing']))
