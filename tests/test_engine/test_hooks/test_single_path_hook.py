"""The search: its loss, the gates' learning rate, the stop rule, resuming, two processes."""

import json
import multiprocessing as mp
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from mmengine.hooks import Hook
from mmengine.model import BaseModel, MMDistributedDataParallel

from mmdynsparse.analysis import architecture_macs
from mmdynsparse.engine import SinglePathSearchHook
from mmdynsparse.engine.architecture_cost import (
    architecture,
    as_string,
    cost_of_gates,
    dense_cost,
    gated_blocks,
    lowest_cost,
    macs_table,
    meet_cost,
    spread_units,
)
from mmdynsparse.models import SparseSwinTransformer, SparseVisionTransformer

SWIN = dict(
    embed_dims=8,
    depths=(1, 1, 2, 1),
    num_heads=(1, 2, 2, 2),
    drop_path_rate=0.0,
    out_indices=(3,),
)
VIT = dict(img_size=64, embed_dims=16, num_layers=3, num_heads=2)
OPTIMIZER = dict(
    constructor='mmdynsparse.FineTuneOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=0.002),
)
PLAIN = dict(optimizer=OPTIMIZER['optimizer'])


class Model(BaseModel):
    """It learns the mean brightness."""

    def __init__(self, kind=SparseSwinTransformer, pruning=None, **cfg):
        super().__init__()
        pruning = dict(search=True) if pruning is None else pruning
        self.backbone = kind(**(cfg or SWIN), pruning=pruning)

    def forward(self, inputs, mode='tensor'):
        error = self.backbone(inputs)[-1].mean((1, 2, 3)) - inputs.mean((1, 2, 3))
        return dict(loss_task=error.square().mean()) if mode == 'loss' else error


def search(target=0.5, **kwargs):
    kwargs = dict(shape=(64, 64), gate_lr=0.05, interval=1) | kwargs
    return dict(type='mmdynsparse.SinglePathSearchHook', target=target, **kwargs)


def run(training, *hooks, model=None, **kwargs):
    torch.manual_seed(0)
    hooks = list(hooks) or [search()]
    options = dict(optim_wrapper=OPTIMIZER, model=model or Model(), custom_hooks=hooks)
    return training(**options | kwargs)


@pytest.fixture(params=[SparseSwinTransformer, SparseVisionTransformer])
def model(request):
    cfg = dict(SWIN, out_indices=(1, 2)) if request.param is SparseSwinTransformer else VIT
    model = Model(request.param, **cfg)
    model.cfg = dict(cfg, type=f'mmdynsparse.{request.param.__name__}')
    return model


def test_the_cost_of_gates_is_that_of_their_architecture(model):
    blocks, size = gated_blocks(model.backbone), (64, 96)
    table = macs_table(model.backbone.geometry, size)
    assert dense_cost(blocks, table) == pytest.approx(architecture_macs(model.cfg, size) / 1e9)
    for p in model.parameters():
        p.data.normal_()
    mixers, hidden = architecture(blocks)
    widths, depths = model.backbone.geometry.widths, model.backbone.geometry.depths
    for i in range(len(mixers), len(depths)):  # what no output depends on has no gates to find
        mixers.append(['msa'] * depths[i])
        hidden.append([widths[i]] * depths[i])
    pruned = dict(model.cfg, pruning=dict(mixers=mixers, hidden=hidden))
    cost = cost_of_gates(blocks, table)
    assert cost.item() == pytest.approx(architecture_macs(pruned, size) / 1e9, rel=1e-5)
    assert lowest_cost(blocks, table) < cost < dense_cost(blocks, table)


@pytest.mark.parametrize('target, sign', [(0.9, -1), (0.99, 1)])
def test_the_loss_pushes_gates_towards_the_target(target, sign):
    """Down where the cost is above the target; those after a closed gate stay."""
    model = Model()
    hook = SinglePathSearchHook(target)
    hook._blocks = gated_blocks(model.backbone)
    hook._table = macs_table(model.backbone.geometry, (64, 64))
    hook._dense = dense_cost(hook._blocks, hook._table)
    hook._blocks[0].mixer.gate_logits.data[1] = -1
    hook._goal = hook._cost() * (1 + 0.1 * sign)
    hook._goal_now = hook._goal
    losses = hook._add_losses(model, (), dict(mode='loss'), dict(loss_task=torch.zeros(())))
    assert losses['loss_cost'].item() == pytest.approx(
        30 * ((hook._cost() - hook._goal) / hook._dense) ** 2, rel=1e-3
    )
    losses['loss_cost'].backward()
    for i, block in enumerate(hook._blocks):
        grad = block.mixer.gate_logits.grad
        assert (grad[: 2 if i == 0 else 3] * sign < 0).all()
        assert i or grad[2] == 0
        assert (block.ffn.gate_logits.grad * sign < 0).all()


@pytest.mark.parametrize('share', [0.85, 0.5, 0.2])
def test_gates_are_shifted_to_a_cost(model, share):
    """The order of the hidden units stays, and so does that of the gates of the attentions."""
    blocks = gated_blocks(model.backbone)
    table = macs_table(model.backbone.geometry, (64, 96))
    for block in blocks:
        block.mixer.gate_logits.data.normal_()
        block.ffn.gate_logits.data.normal_()
    before = [[x.clone() for x in gates] for gates in gates_of(blocks)]
    low = lowest_cost(blocks, table)
    goal = low + share * (dense_cost(blocks, table) - low)
    got = meet_cost(blocks, table, goal)
    unit = max(table.stages[b.stage].unit for b in blocks)
    assert got == pytest.approx(goal, abs=1.01 * unit)
    assert got == pytest.approx(cost_of_gates(blocks, table).item())
    for old, new in zip(before, gates_of(blocks), strict=True):
        shifts = torch.cat([n - o for o, n in zip(old, new, strict=True)])
        torch.testing.assert_close(shifts, shifts[:1].expand_as(shifts))


def gates_of(blocks):
    return [[getattr(b, p).gate_logits.detach() for b in blocks] for p in ('mixer', 'ffn')]


def test_hidden_units_start_in_the_order_of_their_norms(model):
    blocks = gated_blocks(model.backbone)
    searched = blocks[-1].ffn.gate_logits
    searched.data.normal_()
    before = searched.clone()
    spread_units(blocks, 0.5)
    assert torch.equal(searched, before)
    for block in blocks[:-1]:
        (fc, *_), last, *_ = block.ffn.layers
        pairs = zip(fc.weight, last.weight.t(), strict=True)
        norms = torch.stack([row.norm() * column.norm() for row, column in pairs])
        logits = block.ffn.gate_logits.detach()
        assert torch.equal(logits.argsort(), norms.argsort())
        assert logits.min() == 1 and logits.max() == 2 and logits.mean() == pytest.approx(1.5)
        assert (block.mixer.gate_logits == 1.5).all()


class Watch(Hook):
    priority = 'LOW'

    def __init__(self, stop=None):
        self.gates, self.rates, self.costs, self.stop = [], [], [], stop

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.rates.append([g['lr'] for g in runner.optim_wrapper.optimizer.param_groups])

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        gates = [p for n, p in runner.model.named_parameters() if n.endswith('gate_logits')]
        self.gates.append(torch.cat([p.detach().flatten().clone() for p in gates]))
        self.costs.append(outputs['loss_cost'].item())
        if runner.iter + 1 == self.stop:
            runner.train_loop.stop_training = True


def test_the_target_falls(training):
    """From the dense cost at first, in equal steps, to the target at the end of the ramp."""
    watch = Watch()
    run(training, search(0.5, ramp=0.5, gate_lr=1e-9), watch, iters=4)
    gaps = [0, 0.25, 0.5, 0.5]
    assert watch.costs == pytest.approx([30 * gap**2 for gap in gaps], abs=1e-4)


def test_a_search_is_logged_and_written_down(training, tmp_path):
    done = run(training, search(1.0, interval=2), iters=4)
    line = done.log[0]
    assert {'loss_cost', 'cost_share', *(f'kept_hidden_{i}' for i in range(4))} <= line.keys()
    assert line['cost_share'] == pytest.approx(1) and line['kept_hidden_0'] == 1
    assert line['loss_cost'] == pytest.approx(0, abs=1e-6)
    assert done.runner.message_hub.get_info('architecture') == 'M M MM M'
    found = json.loads((tmp_path / 'run' / 'architecture.json').read_text())
    assert found['string'] == 'M M MM M' and found['unit'] == 'GMACs'
    assert found['share'] == pytest.approx(1) and len(found['hidden'][2]) == 2
    assert (tmp_path / 'run' / 'searched.pth').is_file()


def test_gates_learn_at_a_constant_rate(training):
    watch = Watch()
    scheduler = dict(type='PolyLR', eta_min=0.0, power=1.0, begin=0, end=4, by_epoch=False)
    run(training, search(), watch, iters=4, param_scheduler=scheduler)
    assert [rates[-1] for rates in watch.rates] == [0.05] * 4
    others = [rates[0] for rates in watch.rates]
    assert others == sorted(others, reverse=True) and others[-1] < others[0]


def with_gates_apart():
    """A model of cheap attentions, whose gates differ: its task hardly needs any of them."""
    torch.manual_seed(0)
    model = Model(**SWIN, window_size=2)
    for block in gated_blocks(model.backbone):
        block.mixer.gate_logits.data.normal_(1.5, 0.5)
    return model


@pytest.mark.parametrize('target', [0.75, 0.5])
def test_a_search_moves_to_its_target_and_stops(training, tmp_path, target):
    hook = search(target, stop_within=0.1, patience=2)
    done = run(training, hook, model=with_gates_apart(), iters=60)
    assert 36 < done.runner.iter < 60
    found = json.loads((tmp_path / 'run' / 'architecture.json').read_text())
    assert found['share'] == pytest.approx(target, rel=0.1)
    # It does not fall far below first, as it does where all gates close at the same time.
    assert min(line['cost_share'] for line in done.log) > target - 0.12


def test_a_search_that_is_too_short_ends_at_its_target(training, tmp_path):
    done = run(training, search(0.5, gate_lr=0.01), model=with_gates_apart(), iters=4)
    assert done.log[-1]['cost_share'] > 0.8
    found = json.loads((tmp_path / 'run' / 'architecture.json').read_text())
    assert found['share'] == pytest.approx(0.5, rel=0.02)
    state = torch.load(tmp_path / 'run' / 'searched.pth', weights_only=False)['state_dict']
    for name, value in done.model.state_dict().items():
        assert torch.equal(state[name], value), name
    last = torch.load(tmp_path / 'run' / 'iter_4.pth', weights_only=False)['state_dict']
    changed = {name for name, value in last.items() if not torch.equal(value, state[name])}
    assert changed and all(name.endswith('gate_logits') for name in changed)


def test_a_resumed_search_is_the_same(training):
    whole, first, rest = Watch(), Watch(stop=4), Watch()
    a = run(training, search(), whole, folder='whole', iters=8)
    run(training, search(), first, folder='parts', iters=8)
    b = run(training, search(), rest, folder='parts', iters=8, resume=True)
    for got, expected in zip(first.gates + rest.gates, whole.gates, strict=True):
        assert torch.equal(got, expected)
    for (name, p), q in zip(a.model.named_parameters(), b.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_checks_that_met_the_target_are_kept_for_resuming():
    hook = SinglePathSearchHook(0.5)
    hook._hits, checkpoint = 2, dict(meta={})
    hook.before_save_checkpoint(None, checkpoint)
    twin = SinglePathSearchHook(0.5)
    twin.after_load_checkpoint(SimpleNamespace(_resume=True), checkpoint)
    assert twin._hits == 2


def test_measured_time_as_a_cost(training, tmp_path, monkeypatch):
    monkeypatch.setattr('mmdynsparse.engine.architecture_cost.MIN_RUN_TIME', 0.001)
    run(training, search(0.999, unit='ms'), iters=2)
    known = json.loads((tmp_path / 'run' / 'latencies.json').read_text())
    assert known['setting']['shape'] == [64, 64] and len(known['stages']) == 4
    assert all(stage['mixers']['msa'] > 0 == stage['mixers']['none'] for stage in known['stages'])
    # The table of the file is used again.
    known['stages'][0]['mixers']['msa'] = 1000.0
    (tmp_path / 'run' / 'latencies.json').write_text(json.dumps(known))
    run(training, search(0.999, unit='ms'), iters=2)
    found = json.loads((tmp_path / 'run' / 'architecture.json').read_text())
    assert found['target'] > 500 and found['unit'] == 'ms'


def test_strings():
    assert as_string([['conv1', 'none'], ['msa', 'conv3']]) == '1- M3'


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(target=0), 'target must be above 0, got 0'),
        (dict(target='half'), "target must be above 0, got 'half'"),
        (dict(weight=-1), 'weight must be at least 0, got -1'),
        (dict(gate_lr=0), 'gate_lr must be above 0, got 0'),
        (dict(unit='flops'), r"unit must be one of \('macs', 'ms'\), got 'flops'"),
        (dict(stop_within=1), r'stop_within must be in \[0, 1\), got 1'),
        (dict(ramp=1.5), r'ramp must be in \[0, 1\], got 1.5'),
        (dict(spread=-1), 'spread must be at least 0, got -1'),
        (dict(patience=0), 'patience must be a whole number from 1 on, got 0'),
        (dict(interval=0.5), 'interval must be a whole number from 1 on, got 0.5'),
        (dict(shape=(64,)), r'shape must be the height and width .*, got \(64,\)'),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SinglePathSearchHook(**dict(target=0.5) | kwargs)


def test_errors_before_the_first_iteration(training):
    with pytest.raises(ValueError, match=r'target .* must be above .* got 0.01'):
        run(training, search(0.01), folder='a')
    with pytest.raises(ValueError, match=r'target .* must be above .* got 50'):
        run(training, search(50), folder='b')
    with pytest.raises(ValueError, match='because the data preprocessor has no size, got None'):
        run(training, search(shape=None), folder='c')
    with pytest.raises(ValueError, match=r'needs a backbone with pruning=dict\(search=True\), got'):
        static = Model(pruning=dict(mixers=[['msa'], ['msa'], ['msa'] * 2, ['msa']]))
        run(
            training, folder='d', model=static, optim_wrapper=dict(optimizer=OPTIMIZER['optimizer'])
        )
    with pytest.raises(ValueError, match=r'optim_wrapper.constructor must be .* got another one'):
        run(training, folder='e', optim_wrapper=PLAIN)


def worker(rank, model, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', f'file://{folder}/init', rank=rank, world_size=2)
    wrapped = MMDistributedDataParallel(model)
    hook = SinglePathSearchHook(0.5)
    hook._blocks = gated_blocks(model.backbone)
    hook._table = macs_table(model.backbone.geometry, (64, 64))
    hook._dense = dense_cost(hook._blocks, hook._table)
    hook._goal_now = 0.5 * hook._dense
    model.register_forward_hook(hook._add_losses, with_kwargs=True)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.1)
    torch.manual_seed(rank)  # each process samples its own gates
    for _ in range(3):  # a parameter left unused would raise in the next one
        optimizer.zero_grad()
        losses = wrapped(torch.randn(2, 3, 64, 64), mode='loss')
        (losses['loss_task'] + losses['loss_cost']).backward()
        optimizer.step()
    torch.save({n: p.detach() for n, p in model.named_parameters()}, folder / f'{rank}.pth')
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_search_together(tmp_path):
    model = Model().train()
    context = mp.get_context('fork')
    processes = [context.Process(target=worker, args=(r, model, tmp_path)) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    a, b = (torch.load(tmp_path / f'{rank}.pth') for rank in range(2))
    for name, value in a.items():
        assert torch.equal(value, b[name]), name
        if name.endswith('gate_logits'):
            assert not torch.equal(value, model.get_parameter(name)), name
