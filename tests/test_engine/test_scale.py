"""Trainings with all hooks: several processes, accumulation, sharding, precision, averaging."""

import multiprocessing as mp
import os
import random
from functools import partial
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from mmengine.hooks import Hook
from mmengine.registry import MODELS, RUNNERS, init_default_scope
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from mmdynsparse.ops import select

HOOKS = [
    dict(type='mmdynsparse.SparsityHook'),
    dict(type='mmdynsparse.DistillationHook'),
    dict(type='mmdynsparse.FreezePretrained', iters=1),
]

needs_gloo = pytest.mark.skipif(
    torch.cuda.is_available(), reason='forked processes cannot use CUDA, where the runner would be'
)


class Dataset(list):
    metainfo: ClassVar[dict] = dict(classes=('ground', 'thing'))


def train(tiny, folder, indices, batch, iters, hooks=HOOKS, build=None, **kwargs):
    """Train the tiny segmentor on some images; return its logs, masks and weights."""
    losses, masks = [], []

    class Watch(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            model = getattr(runner.model, 'module', runner.model)
            losses.append({name: value.item() for name, value in outputs.items()})
            masks.append([d.mask.detach().clone() for d in model.backbone.decisions])

    def collate(items):
        return {key: [item[key] for item in items] for key in ('inputs', 'data_samples')}

    torch.manual_seed(0)
    data = Dataset(tiny.sample('seg', i) for i in indices)
    arguments = dict(
        model=(build or tiny.build)('seg'),
        work_dir=str(folder),
        train_dataloader=DataLoader(data, batch, collate_fn=collate),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=iters),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=iters, by_epoch=False)),
        custom_hooks=[*hooks, Watch()],
        default_scope='mmseg',
        log_processor=dict(by_epoch=False),
        visualizer=dict(type='Visualizer', vis_backends=[]),
        randomness=dict(seed=0),
        experiment_name=f'{folder}_{random.random()}'.replace('/', '_'),
    )
    runner = RUNNERS.get(kwargs.pop('runner', 'Runner'))(**arguments | kwargs)
    model = runner.train()
    weights = getattr(model, 'module', model).state_dict()
    return dict(losses=losses, masks=masks, weights=weights)


def with_group_norm(tiny):
    """Build the segmentor with a norm that does not see the other images of a batch."""

    def build(task):
        model = tiny.build(task)
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    setattr(parent, name, nn.GroupNorm(4, child.num_features))
        return model

    return build


def spawn(work, *args):
    """Run ``work(rank, ...)`` in two processes that are connected by gloo; return the results."""
    context = mp.get_context('fork')
    folder = args[1]
    processes = [context.Process(target=_connected, args=(rank, work, *args)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    return [torch.load(folder / f'result_{rank}.pth') for rank in range(2)]


def _connected(rank, work, tiny, folder, *args):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2')
    dist.init_process_group('gloo', f'file://{folder}/init', rank=rank, world_size=2)
    torch.save(work(rank, tiny, folder, *args), folder / f'result_{rank}.pth')
    dist.destroy_process_group()


DDP = dict(
    launcher='pytorch',
    cfg=dict(
        model_wrapper_cfg=dict(
            type='MMDistributedDataParallel',
            broadcast_buffers=False,
            find_unused_parameters=False,
            device_ids=None,
        )
    ),
)


def split_training(rank, tiny, folder, hooks):
    wrapper = dict(optimizer=dict(type='SGD', lr=0.1), accumulative_counts=2)
    indices = (2 * rank, 2 * rank + 1)
    build = with_group_norm(tiny)
    return train(tiny, folder / 'work', indices, 1, 2, hooks, build, optim_wrapper=wrapper, **DDP)


@needs_gloo
def test_losses_do_not_depend_on_how_a_batch_is_split(tiny, tmp_path, monkeypatch):
    """Two processes that accumulate two images are one batch of four."""
    monkeypatch.setattr(select.F, 'gumbel_softmax', lambda logits, dim: logits.softmax(dim))
    hooks = HOOKS[:2]
    parts = spawn(split_training, tiny, tmp_path, hooks)
    build = with_group_norm(tiny)
    whole = train(tiny, tmp_path / 'one', range(4), 4, 1, hooks, build)
    for name, value in whole['losses'][0].items():
        if 'acc' not in name:
            values = [losses[name] for part in parts for losses in part['losses']]
            assert len(values) == 4
            assert sum(values) / 4 == pytest.approx(value, rel=1e-4, abs=1e-7), name
    assert {'loss_keep_ratio', 'loss_distill_logits'} < whole['losses'][0].keys()
    for name, value in whole['weights'].items():
        for part in parts:
            torch.testing.assert_close(part['weights'][name], value, atol=1e-5, rtol=1e-4, msg=name)


def same_images(rank, tiny, folder, run):
    return train(tiny, folder / f'work{run}', (0, 1) * 3, 2, 3, **DDP)


@needs_gloo
def test_noise_depends_on_seed_and_rank(tiny, tmp_path):
    """Both processes see the same images, and a second run is the first one."""
    runs = []
    for run in range(2):
        folder = tmp_path / str(run)
        folder.mkdir()
        runs.append(spawn(same_images, tiny, folder, run))
    (a, b), again = runs
    for name in ('losses', 'masks', 'weights'):
        for one, other in zip((a, b), again, strict=True):
            torch.testing.assert_close(one[name], other[name], atol=0, rtol=0)
    for i in (0, 2):
        assert not torch.equal(a['masks'][i][0], b['masks'][i][0])
    torch.testing.assert_close(
        {k: v for k, v in a['weights'].items() if 'running' not in k},
        {k: v for k, v in b['weights'].items() if 'running' not in k},
    )


def with_following_head(tiny):
    """Build the segmentor with a head that follows the decision of the backbone."""

    def build(task):
        cfg = tiny.config(task)
        sparsity = dict(keep_ratio=0.25, predictor='backbone')
        cfg.decode_head.update(type='mmdynsparse.SparseUPerHead', sparsity=sparsity)
        return MODELS.build(cfg)

    return build


def train_following_head(rank, tiny, folder):
    init_default_scope('mmseg')
    build = with_following_head(tiny)
    return train(
        tiny, folder / 'work', range(2 * rank, 2 * rank + 4), 2, 2, HOOKS[:2], build, **DDP
    )


@needs_gloo
def test_decisions_for_the_head_in_two_processes(tiny, tmp_path):
    """No parameter is left without a gradient, which would be an error."""
    a, b = spawn(train_following_head, tiny, tmp_path)
    names = [name for name in a['weights'] if 'predictors' in name]
    assert names and not [name for name in a['weights'] if 'decider' in name]
    for name in names:
        torch.testing.assert_close(a['weights'][name], b['weights'][name])
    assert len(a['losses']) == 2
    assert all(losses['keep_rate_1'] == 0.25 for losses in a['losses'])


def test_one_process_is_deterministic(tiny, tmp_path):
    first, second = (train(tiny, tmp_path / str(i), range(6), 2, 3) for i in range(2))
    assert first['losses'] == second['losses']
    other = train(tiny, tmp_path / 'other', range(6), 2, 3, randomness=dict(seed=1))
    assert first['losses'][2] != other['losses'][2]


def test_a_resumed_training_is_the_whole_one(tiny, tmp_path, monkeypatch):
    """With all hooks, while pretrained parameters are frozen; what it draws at random aside."""
    monkeypatch.setattr(select.F, 'gumbel_softmax', lambda logits, dim: logits.softmax(dim))
    hooks = [
        *HOOKS[:2],
        dict(type='mmdynsparse.FreezePretrained', iters=3),
        dict(type='EMAHook'),
    ]
    saving = dict(checkpoint=dict(type='CheckpointHook', interval=2, by_epoch=False))
    wrapper = dict(
        optimizer=dict(type='AdamW', lr=1e-3),
        constructor='mmdynsparse.FineTuneOptimWrapperConstructor',
        paramwise_cfg=dict(pretrained_lr_mult=0.2),
    )
    run = partial(
        train, tiny, tmp_path, range(10), 2, 5, hooks, optim_wrapper=wrapper, default_hooks=saving
    )
    whole = run()
    whole_checkpoint = torch.load(tmp_path / 'iter_5.pth', weights_only=False)
    resumed = run(load_from=str(tmp_path / 'iter_2.pth'), resume=True)
    assert len(resumed['losses']) == 3
    for expected, actual in zip(whole['losses'][2:], resumed['losses'], strict=True):
        assert actual == pytest.approx(expected, rel=1e-5, abs=1e-8)
    checkpoint = torch.load(tmp_path / 'iter_5.pth', weights_only=False)
    for name in ('state_dict', 'ema_state_dict'):
        torch.testing.assert_close(checkpoint[name], whole_checkpoint[name])


def test_checkpointed_activations_change_nothing(tiny, tmp_path):
    def build(task):
        return tiny.build(task, with_cp=True)

    plain = train(tiny, tmp_path / 'plain', range(4), 2, 2)
    saved = train(tiny, tmp_path / 'saved', range(4), 2, 2, build=build)
    torch.testing.assert_close(plain['weights'], saved['weights'])
    torch.testing.assert_close(plain['losses'], saved['losses'])


def test_bfloat16(tiny, tmp_path):
    wrapper = dict(
        type='mmdynsparse.utils.command_line.cpu.BFloat16OptimWrapper',
        optimizer=dict(type='SGD', lr=0.1),
    )
    half = train(tiny, tmp_path / 'half', range(4), 2, 2, optim_wrapper=wrapper)
    full = train(tiny, tmp_path / 'full', range(4), 2, 2)
    for a, b in zip(half['losses'], full['losses'], strict=True):
        assert a['loss'] == pytest.approx(b['loss'], rel=0.05) and a['loss'] != b['loss']
    assert all(v.dtype != torch.bfloat16 for v in half['weights'].values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason='float16 needs CUDA')
def test_float16(tiny, tmp_path):
    wrapper = dict(type='AmpOptimWrapper', dtype='float16', optimizer=dict(type='SGD', lr=0.1))
    half = train(tiny, tmp_path / 'half', range(4), 2, 2, optim_wrapper=wrapper)
    full = train(tiny, tmp_path / 'full', range(4), 2, 2)
    for a, b in zip(half['losses'], full['losses'], strict=True):
        assert a['loss'] == pytest.approx(b['loss'], rel=0.05)


def test_ema_averages_the_student_alone(tiny, tmp_path):
    hooks = [*HOOKS, dict(type='EMAHook', momentum=0.5)]
    result = train(tiny, tmp_path, range(4), 2, 2, hooks)
    saved = torch.load(tmp_path / 'iter_2.pth', weights_only=False)
    names = {name.removeprefix('module.') for name in saved['ema_state_dict']} - {'steps'}
    assert names == set(result['weights']) == set(saved['state_dict'])
    # The checkpoint holds the average under state_dict and the weights under ema_state_dict.
    name = 'decode_head.conv_seg.weight'
    torch.testing.assert_close(saved['ema_state_dict'][f'module.{name}'], result['weights'][name])
    assert not torch.equal(saved['state_dict'][name], result['weights'][name])


def test_a_teacher_with_synchronised_norms(tiny, tmp_path):
    """The teacher never needs the other processes, nor CUDA: it is in eval mode."""
    model = tiny.build('seg')
    runner = Runner(
        model,
        str(tmp_path),
        train_dataloader=DataLoader(Dataset([tiny.sample('seg', 0)])),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=1),
        custom_hooks=HOOKS[1:2],
        experiment_name=str(tmp_path).replace('/', '_'),
    )
    # The runner of a single process would turn them back.
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    (hook,) = (hook for hook in runner.hooks if type(hook).__name__ == 'DistillationHook')
    hook.before_train(runner)
    assert any(isinstance(m, nn.SyncBatchNorm) for m in hook._teacher.modules())
    sample = tiny.sample('seg', 0)
    batch = model.data_preprocessor({k: [v] for k, v in sample.items()}, True)
    losses = model.eval()(**batch, mode='loss')
    assert losses['loss_distill_logits'].isfinite()
    hook.after_train(runner)


def sharded_training(rank, tiny, folder, hooks, iters=3, **kwargs):
    # Full state dicts of torch's FSDP need CUDA.
    strategy = dict(
        type='mmdynsparse.FSDPStrategy',
        model_wrapper=dict(type='MMFullyShardedDataParallel', device_id=torch.device('cpu')),
        state_dict_cfg='local',
    )
    return train(
        tiny,
        folder / 'work',
        (2 * rank, 2 * rank + 1) * 3,
        2,
        iters,
        hooks,
        with_group_norm(tiny),
        runner='FlexibleRunner',
        strategy=strategy,
        launcher='pytorch',
        **kwargs,
    )


@needs_gloo
def test_a_sharded_model_trains_as_a_whole_one(tiny, tmp_path, monkeypatch):
    """Frozen in the first iteration; learning in the second, seen in the third."""
    monkeypatch.setattr(select.F, 'gumbel_softmax', lambda logits, dim: logits.softmax(dim))
    # The teacher has other weights than the student, and norms of a batch.
    torch.manual_seed(1)
    torch.save(tiny.build('seg', dense=True).state_dict(), tmp_path / 'teacher.pth')
    config = dict(model=tiny.config('seg', dense=True), default_scope='mmseg')
    teacher = dict(config=config, checkpoint=str(tmp_path / 'teacher.pth'))
    hooks = [*HOOKS]
    hooks[1] = dict(type='mmdynsparse.DistillationHook', teacher=teacher)
    parts = spawn(sharded_training, tiny, tmp_path, hooks)
    whole = train(tiny, tmp_path / 'one', [*range(4)] * 3, 4, 3, hooks, with_group_norm(tiny))
    for i, losses in enumerate(whole['losses']):
        for name, value in losses.items():
            if 'acc' not in name:
                mean = sum(part['losses'][i][name] for part in parts) / 2
                assert mean == pytest.approx(value, rel=1e-3), (i, name)


def resumed_sharded_training(rank, tiny, folder):
    whole, begun, resumed = (folder / name for name in ('whole', 'begun', 'resumed'))
    arguments = dict(hooks=HOOKS[:1], optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3)))
    expected = sharded_training(rank, tiny, whole, **arguments)['losses']
    sharded_training(rank, tiny, begun, iters=2, **arguments)
    arguments |= dict(load_from=str(begun / 'work' / 'iter_2.pth'), resume=True)
    return expected, sharded_training(rank, tiny, resumed, **arguments)['losses']


@needs_gloo
def test_a_sharded_training_is_resumed(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(select.F, 'gumbel_softmax', lambda logits, dim: logits.softmax(dim))
    for expected, resumed in spawn(resumed_sharded_training, tiny, tmp_path):
        assert len(expected) == 3 and len(resumed) == 1
        assert expected[2] == pytest.approx(resumed[0], rel=1e-5)
        assert expected[2]['loss'] != pytest.approx(expected[1]['loss'], rel=1e-5)


def sharded_self_teaching(rank, tiny, folder):
    try:
        sharded_training(rank, tiny, folder, HOOKS)
    except ValueError as error:
        return str(error)


@needs_gloo
def test_a_sharded_model_cannot_be_copied(tiny, tmp_path):
    for message in spawn(sharded_self_teaching, tiny, tmp_path):
        assert "teacher 'self' cannot be copied from a sharded model" in message
