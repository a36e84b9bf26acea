import json
import logging
from pathlib import Path

import pytest
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mmdynsparse.engine import SparsityHook, runs
from mmdynsparse.engine.hooks import sparsity_hook
from mmdynsparse.engine.hooks.sparsity_hook import KeepRateMeter, collapse, sparsity_losses
from mmdynsparse.models import SparseSwinTransformer
from mmdynsparse.models.decider import CellSparsity, Decider
from mmdynsparse.ops import Decision, select


class Model(BaseModel):
    """The smallest model with a sparse backbone: it learns the mean brightness."""

    def __init__(self, **sparsity):
        super().__init__()
        self.backbone = SparseSwinTransformer(
            embed_dims=8,
            depths=(1, 1, 3, 1),
            num_heads=(1, 2, 2, 2),
            drop_path_rate=0.0,
            sparsity=dict(keep_ratio=0.7, locations={2: (0, 1, 2)}, **sparsity),
        )

    def forward(self, inputs, mode='tensor'):
        error = self.backbone(inputs)[-1].mean((1, 2, 3)) - inputs.mean((1, 2, 3))
        return dict(loss_task=error.square().mean()) if mode == 'loss' else error


class Count(BaseMetric):
    """Metric that any model passes."""

    def process(self, data_batch, data_samples):
        self.results.append(len(data_samples))

    def compute_metrics(self, results):
        return dict(images=sum(results))


def run(
    tmp_path, iters=4, hook=None, model=None, resume=False, backend='LocalVisBackend', **kwargs
):
    images = [torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(8)]

    def loader(repeat=1):
        collate = dict(collate_fn=lambda b: dict(inputs=torch.stack(b)))
        return DataLoader(images * repeat, 2, **collate)

    torch.manual_seed(0)
    runner = Runner(
        model or Model(),
        str(tmp_path),
        train_dataloader=loader(repeat=iters),  # mmengine sleeps between epochs
        val_dataloader=loader(),
        test_dataloader=loader(),
        optim_wrapper=dict(optimizer=dict(type='Adam', lr=0.002)),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=iters, val_interval=iters),
        val_cfg={},
        test_cfg={},
        val_evaluator=Evaluator(Count()),
        test_evaluator=Evaluator(Count()),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint=dict(type='CheckpointHook', interval=iters, by_epoch=False),
        ),
        log_processor=dict(window_size=1, by_epoch=False),
        visualizer=dict(type='Visualizer', vis_backends=[dict(type=backend)]),
        custom_hooks=[hook or dict(type='mmdynsparse.SparsityHook')],
        randomness=dict(seed=0),
        resume=resume,
        experiment_name=f'{tmp_path}_{iters}_{resume}'.replace('/', '_'),
        **kwargs,
    )
    runner.train()
    return runner


def scalars(runner):
    """Lines of the training log as dicts."""
    path = next(Path(runner.log_dir).glob('vis_data/scalars.json'))
    return [json.loads(line) for line in path.read_text().splitlines()]


def decision(rates, ratio, n=20):
    mask = torch.stack([(torch.arange(n) < round(r * n)).float() for r in rates])
    return Decision(mask, torch.zeros_like(mask), (4, 5), ratio)


def test_loss_per_image_and_per_batch():
    decisions = [decision((0.6, 0.8), 0.7), decision((0.5, 0.5), 0.3)]
    losses = sparsity_losses(decisions, weight=10)
    assert losses['loss_keep_ratio'].item() == pytest.approx(10 * (0.01 + 0.04) / 2)
    assert losses['keep_rate_0'].item() == pytest.approx(0.7)
    batch = sparsity_losses(decisions, weight=10, per_image=False)
    assert batch['loss_keep_ratio'].item() == pytest.approx(10 * (0.0 + 0.04) / 2, abs=1e-6)
    assert sparsity_losses([], weight=10) == {}


def test_loss_is_of_the_decisions_that_learn():
    """Decisions without a gradient are logged, and leave the loss to those with one."""
    learned = decision([0.3], 0.5)
    learned = learned._replace(mask=learned.mask.requires_grad_())
    losses = sparsity_losses([decision([0.9], 0.5), learned], weight=10)
    torch.testing.assert_close(losses['loss_keep_ratio'].item(), 0.4)
    assert losses['keep_rate_0'] == decision([0.9], 0.5).mask.mean()


def test_decisions_that_do_not_count_are_logged():
    learned = [decision([rate], 0.5) for rate in (0.3, 0.5)]
    learned = [d._replace(mask=d.mask.requires_grad_()) for d in learned]
    losses = sparsity_losses(learned, weight=10, counts=[True, False])
    torch.testing.assert_close(losses['loss_keep_ratio'].item(), 0.4)
    assert losses['keep_rate_1'] == learned[1].mask.mean()


def test_a_head_that_follows_does_not_weaken_the_loss(tmp_path):
    """It keeps exactly its ratio, so its error is 0."""
    model = Model()
    model.decider = Decider(CellSparsity(keep_ratio=0.5, predictor='backbone'), 8)

    def decide(module, args, maps):
        model.decider([model.decider.decide_early(maps, (16, 16))])

    model.backbone.register_forward_hook(decide)
    hook = SparsityHook(weight=8, per_image=False)
    train = [line for line in scalars(run(tmp_path, hook=hook, model=model)) if 'loss' in line]
    for line in train:
        errors = [(line[f'keep_rate_{i}'] - r) ** 2 for i, r in enumerate((0.7, 0.5, 0.3))]
        assert line['loss_keep_ratio'] == pytest.approx(8 * sum(errors) / 3, rel=1e-3)
        assert line['keep_rate_3'] == 0.5


def test_predictors_with_nothing_to_learn_are_logged_alone(tmp_path, monkeypatch):
    """No loss, and no warning, whatever they keep."""
    monkeypatch.setattr(sparsity_hook, 'CHECK_INTERVAL', 2)
    monkeypatch.setattr(sparsity_hook, 'warn', lambda text: 1 / 0)
    selector = dict(type='value', most=0.1)
    runner = run(
        tmp_path, model=Model(predictor=dict(type='mmdynsparse.MagnitudeScore'), selector=selector)
    )
    train = [line for line in scalars(runner) if 'loss' in line]
    for line in train:
        assert line['loss'] == pytest.approx(line['loss_task'], rel=1e-4)
        assert 'loss_keep_ratio' not in line
        assert [line[f'keep_rate_{i}'] for i in range(3)] == [1 / 16] * 3


def test_training_logs_losses_and_rates(tmp_path):
    runner = run(tmp_path)
    train = [line for line in scalars(runner) if 'loss' in line]
    assert len(train) == 4
    for line in train:
        assert line['loss'] == pytest.approx(line['loss_task'] + line['loss_keep_ratio'], rel=1e-4)
        assert all(0 <= line[f'keep_rate_{i}'] <= 1 for i in range(3))
    backbone = runner.model.backbone
    assert not backbone.decider.has_ratio_loss and not runner.model._forward_hooks


def test_validation_and_test_log_the_measured_rates(tmp_path):
    runner = run(tmp_path)
    runner.test()
    # 64 x 64 px give 16 locations in the third stage.
    expected = [int(16 * r) / 16 for r in (0.7, 0.5, 0.3)]
    hub = MessageHub.get_instance(runner.experiment_name)
    for mode in ('val', 'test'):
        logged = [hub.get_scalar(f'{mode}/eval_keep_rate_{i}').current() for i in range(3)]
        assert logged == pytest.approx(expected)
    assert any('eval_keep_rate_2' in line for line in scalars(runner))


def test_tensorboard_gets_the_rates(tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runner = run(tmp_path, backend='TensorboardVisBackend')
    events = EventAccumulator(str(Path(runner.log_dir) / 'vis_data'))
    events.Reload()
    assert {'keep_rate_0', 'loss_keep_ratio', 'eval_keep_rate_0'} <= set(events.Tags()['scalars'])


def test_the_keep_rate_reaches_its_target(tmp_path):
    runner = run(tmp_path, iters=250, hook=SparsityHook(weight=30))
    last = [line for line in scalars(runner) if 'loss' in line][-50:]
    for i, target in enumerate((0.7, 0.5, 0.3)):
        mean = sum(line[f'keep_rate_{i}'] for line in last) / len(last)
        assert mean == pytest.approx(target, abs=0.05)


def test_warmup_raises_the_weight(tmp_path):
    hook = SparsityHook(weight=8, per_image=False, warmup_iters=3)
    train = [line for line in scalars(run(tmp_path, hook=hook)) if 'loss' in line]
    for i, line in enumerate(train):
        errors = [(line[f'keep_rate_{j}'] - r) ** 2 for j, r in enumerate((0.7, 0.5, 0.3))]
        expected = 8 * min(1, (i + 1) / 3) * sum(errors) / 3
        assert line['loss_keep_ratio'] == pytest.approx(expected, rel=1e-3)


def test_collapse_is_warned_of(tmp_path, monkeypatch):
    messages = []
    target = 'mmdynsparse.engine.runs.print_log'
    monkeypatch.setattr(target, lambda text, level, **kwargs: messages.append((level, text)))
    model = Model()
    model.init_weights = lambda: None
    for predictor, bias in zip(
        model.backbone.stages[2].predictors, ((-30, 30), (30, -30)), strict=False
    ):
        predictor.fc3.bias.data = torch.tensor(bias, dtype=torch.float)
    monkeypatch.setattr(sparsity_hook, 'CHECK_INTERVAL', 2)
    run(tmp_path, model=model, hook=SparsityHook(weight=0), iters=2)
    texts = [text for level, text in messages if level == logging.WARNING]
    assert any('Predictor 0 keeps nothing' in t and 'target 0.7' in t for t in texts)
    assert any('Predictor 1 keeps everything' in t for t in texts)
    assert not any('Predictor 2' in t for t in texts)


@pytest.mark.parametrize(
    'rate, target, expected',
    [
        (0.05, 0.7, 'nothing'),
        (0.98, 0.7, 'everything'),
        (0.7, 0.7, ''),
        (1.0, 1.0, ''),
        (0.95, 0.9, ''),
        (float('nan'), 0.5, ''),
    ],
)
def test_collapse(rate, target, expected):
    assert collapse(rate, target) == expected


def test_meter_averages_over_images_of_all_forwards():
    model = Model(selector='threshold').backbone.eval()
    meter = KeepRateMeter([model.decider])
    rates = []
    with torch.no_grad():
        for batch in (1, 3):
            model(torch.randn(batch, 3, 64, 64))
            rates += [
                torch.stack([d.mask[i].mean() for d in model.decisions]) for i in range(batch)
            ]
    assert meter.pop() == pytest.approx(torch.stack(rates).mean(0).tolist())
    assert all(r != r for r in meter.pop())


def test_bad_arguments(tmp_path):
    for name, value in (('weight', -1), ('warmup_iters', -3)):
        with pytest.raises(ValueError, match=f'{name} must be at least .*got {value}'):
            SparsityHook(**{name: value})


def test_warmup_longer_than_the_training(tmp_path):
    with pytest.raises(
        ValueError, match=r'warmup_iters of SparsityHook must be at most .* 4 .*got 5'
    ):
        run(tmp_path, hook=SparsityHook(warmup_iters=5))


def test_checkpoint_of_another_backbone(tmp_path):
    weights = Model().state_dict()
    dense = {key: value for key, value in weights.items() if 'predictors' not in key}
    torch.save(dense, tmp_path / 'dense.pth')
    run(tmp_path, load_from=str(tmp_path / 'dense.pth'))
    for name, other, fault in (
        ('narrow', {key: value[..., :1] for key, value in weights.items()}, 'of another shape'),
        ('nested', dict(model=weights), 'missing keys'),
        (
            'backbone alone',
            {k.removeprefix('backbone.'): v for k, v in weights.items()},
            'missing keys',
        ),
    ):
        torch.save(other, tmp_path / f'{name}.pth')
        with pytest.raises(ValueError, match=rf'load_from must hold the .*got \d+ .*{fault}'):
            run(tmp_path, load_from=str(tmp_path / f'{name}.pth'))


def test_resume_with_other_keep_ratios_is_warned_of(training, warnings_of):
    texts = warnings_of(runs)
    training(iters=2)
    training(iters=3, resume=True)
    assert not texts
    model = training.__globals__['Model'](keep_ratio=0.9)
    training(iters=4, resume=True, model=model)
    (text,) = texts
    assert '[0.7, 0.5, 0.3]' in text and '[0.9, 0.7, 0.5]' in text


def test_model_without_sparse_backbone_is_refused(tmp_path):
    model = Model()
    model.backbone = torch.nn.Conv2d(3, 1, 3)
    with pytest.raises(ValueError, match='needs a model with a sparse part'):
        run(tmp_path, model=model)


def test_resume_continues_the_loss_curve(tmp_path, monkeypatch):
    # The noise is drawn anew after a resume, so the comparison is without it.
    monkeypatch.setattr(select.F, 'gumbel_softmax', lambda logits, dim: logits.softmax(dim))
    full = [line for line in scalars(run(tmp_path / 'full', iters=6)) if 'loss' in line]
    run(tmp_path / 'halves', iters=4)
    rest = run(tmp_path / 'halves', iters=6, resume=True)
    # Both halves write the same log when they start within one second.
    resumed = [line for line in scalars(rest) if 'loss' in line][-2:]
    assert [line['step'] for line in resumed] == [5, 6]
    for a, b in zip(full[4:], resumed, strict=True):
        assert a['loss'] == pytest.approx(b['loss'], rel=1e-4)
