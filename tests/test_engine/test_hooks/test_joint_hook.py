"""Dense and sparse updates in turn: their kinds, ratios, losses and gradients."""

import multiprocessing as mp
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from mmengine.hooks import Hook
from mmengine.model import BaseModel, MMDistributedDataParallel

from mmdynsparse.engine import DenseSparseSchedule
from mmdynsparse.models import SparseSwinTransformer, SparseVisionTransformer
from mmdynsparse.models.decider import deciders, set_keep_ratio


class Watch(Hook):
    """Notes the keep ratios of each iteration, and what was kept."""

    priority = 'LOW'

    def __init__(self):
        self.ratios, self.rates, self.between = [], [], []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.backbone = runner.model.backbone
        self.ratios.append(self.backbone.keep_ratios)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.rates.append([d.mask.mean(1).tolist() for d in self.backbone.decisions])
        self.between.append(self.backbone.keep_ratios)


def schedule(**kwargs):
    return dict(type='mmdynsparse.DenseSparseSchedule', **kwargs)


def test_updates_take_turns(training):
    watch = Watch()
    run = training(schedule(), watch, iters=4)
    dense, own = [1.0, 1.0, 1.0], [0.7, 0.5, 0.3]
    assert watch.ratios == [dense, own, dense, own]
    assert watch.between == [own] * 4
    # Exactly the keep ratio of 16 locations, rounded down, in each of two images.
    assert watch.rates[0] == [[1.0, 1.0]] * 3
    assert watch.rates[1] == [[11 / 16] * 2, [8 / 16] * 2, [4 / 16] * 2]
    assert [line['sparse_update'] for line in run.log] == [0, 1, 0, 1]
    assert [line['loss_keep_ratio'] for line in run.log] == pytest.approx([0] * 4, abs=1e-6)
    assert not run.model.backbone.decider.serves_all


def test_kinds_follow_updates_and_not_iterations(training):
    watch = Watch()
    optim = dict(optimizer=dict(type='AdamW', lr=0.002), accumulative_counts=2)
    training(schedule(period=2), watch, iters=12, optim_wrapper=optim)
    assert [r[0] < 1 for r in watch.ratios] == [False] * 4 + [True] * 4 + [False] * 4


def test_an_epoch_of_a_loop_that_never_ends():
    """9 images in batches of 2 by 2 processes, and 2 iterations to an update."""
    hook = DenseSparseSchedule(period='epoch')
    loader = SimpleNamespace(dataset=range(9), batch_size=2, __len__=lambda self: 9)
    loader = type('Loader', (), vars(loader))()
    runner = SimpleNamespace(
        train_dataloader=loader,
        train_loop=None,
        world_size=2,
        optim_wrapper=SimpleNamespace(_accumulative_counts=2),
    )
    assert hook._length(runner) == 2


@pytest.mark.parametrize('together', [True, False])
def test_sampled_ratios_are_those_of_a_resumed_training(together, training):
    kwargs = dict(keep_ratio=(0.5, 0.9), together=together)
    whole, first, rest = Watch(), Watch(), Watch()
    training(schedule(**kwargs), whole, folder='whole', iters=8)
    training(schedule(**kwargs), first, folder='parts', iters=4)
    training(schedule(**kwargs), rest, folder='parts', iters=8, resume=True)
    assert first.ratios + rest.ratios == whole.ratios
    sparse = torch.tensor(whole.ratios[1::2])
    assert (sparse[:, 0] >= 0.5).all() and (sparse[:, 0] <= 0.9).all()
    assert len(sparse[:, 0].unique()) > 1
    steps = (sparse[:, 0] - sparse[:, 1]).round(decimals=4)
    assert (steps == 0.2).all() == together


def test_a_dense_update_is_the_dense_model(training, randomize):
    """Its loss is that of a model that keeps everything, and predictors get no gradient."""
    model = randomize(training(iters=1).model.cpu(), std=0.05).train()
    images = torch.randn(2, 3, 64, 64)
    set_keep_ratio(model, 1.0)
    model.backbone.decider.serves_all = True
    loss = model(images, mode='loss')['loss_task']
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if '.predictors.' in name}
    assert grads and all(grad is not None and grad.eq(0).all() for grad in grads.values())
    expected = model.eval()(images, mode='loss')['loss_task']
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)


def worker(rank, model, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', f'file://{folder}/init', rank=rank, world_size=2)
    wrapped = MMDistributedDataParallel(model)
    decider = model.backbone.decider
    for ratio in (1.0, 0.7, 1.0):  # a parameter left unused would raise in the next one
        decider.set_keep_ratio(ratio)
        torch.manual_seed(rank)
        wrapped(torch.randn(2, 3, 64, 64), mode='loss')['loss_task'].backward()
    dist.destroy_process_group()


def test_both_kinds_of_updates_use_all_parameters_of_two_processes(training, tmp_path):
    model = training(iters=1).model.train()
    model.backbone.decider.serves_all = True
    context = mp.get_context('fork')
    processes = [context.Process(target=worker, args=(r, model, tmp_path)) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(period=0), "period must be at least 1 or 'epoch', got 0"),
        (dict(period=1.5), 'period must be at least 1'),
        (dict(keep_ratio=0.5), 'lowest and the highest keep ratio'),
        (dict(keep_ratio=(0.9, 0.3)), 'lowest and the highest keep ratio'),
        (dict(keep_ratio=(0.0, 0.3)), 'lowest and the highest keep ratio'),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DenseSparseSchedule(**kwargs)


class Model(BaseModel):
    def __init__(self, **sparsity):
        super().__init__()
        self.backbone = SparseSwinTransformer(
            embed_dims=8,
            depths=(1, 1, 2, 1),
            num_heads=(1, 1, 1, 1),
            sparsity=dict(keep_ratio=0.5, locations={2: (0,)}) | sparsity,
        )

    def forward(self, inputs, mode='tensor'):
        return self.backbone(inputs)


def test_bad_parts_and_ratios_before_the_first_iteration(training):
    with pytest.raises(ValueError, match=r"sparse parts of the model, \['backbone'\], got"):
        training(schedule(parts=['neck']), folder='a')
    with pytest.raises(ValueError, match='goes too low for backbone: keep_ratio of decision 2'):
        training(schedule(keep_ratio=(0.3, 0.9)), folder='b')
    training(schedule(keep_ratio=(0.3, 0.9), together=False), folder='c', iters=2)
    with pytest.raises(ValueError, match="which teaches an order, got 'threshold' in backbone"):
        training(schedule(), folder='d', model=Model(selector='threshold'))


def test_nearest_ratios_respect_followers():
    locations = {1: (0,), 2: (0,), 3: (0,)}
    (decider,) = deciders(Model(locations=locations, follow=(2,))).values()
    assert decider.nearest([0.3, 0.9, 0.5]) == [0.3, 0.3, 0.5]
    decider.falling = True
    assert decider.nearest([0.3, 0.9, 0.5]) == [0.9, 0.9, 0.3]


class TokenModel(BaseModel):
    """The smallest model with a backbone that prunes tokens by their attention."""

    def __init__(self):
        super().__init__()
        self.backbone = SparseVisionTransformer(
            img_size=64,
            embed_dims=16,
            num_layers=4,
            num_heads=2,
            out_indices=(3,),
            sparsity=dict(
                keep_ratio=0.5,
                locations={0: (2,)},
                predictor=dict(type='mmdynsparse.AttentionScore'),
            ),
        )

    def forward(self, inputs, mode='tensor'):
        error = self.backbone(inputs)[-1].mean((1, 2, 3)) - inputs.mean((1, 2, 3))
        return dict(loss_task=error.square().mean()) if mode == 'loss' else error


def test_importance_is_distilled_in_both_kinds_of_updates(training):
    """Without a predictor that learns, too: nothing is sampled, and no ratio loss is missed."""
    distillation = dict(
        type='mmdynsparse.DistillationHook',
        logit_weight=0.0,
        features=dict(),
        importance=dict(weight=1.0),
    )
    watch = Watch()
    run = training(schedule(), distillation, watch, model=TokenModel())
    assert all(line['loss_distill_importance'] > 0 for line in run.log)
    assert watch.rates == [[[1.0, 1.0]], [[0.5, 0.5]]] * 2
    assert all('loss_keep_ratio' not in line for line in run.log)
