import math
from copy import deepcopy
from typing import ClassVar

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import DataLoader

from mmdynsparse.engine import DistillationHook, runs
from mmdynsparse.utils.command_line.cpu import BFloat16OptimWrapper

FEATURES = dict(seg={'backbone': 0.5, 'decode_head.fpn_bottleneck': 2.0}, det=dict(neck=0.5))
LOSSES = dict(
    seg={'loss_distill_logits', 'loss_distill_backbone', 'loss_distill_decode_head_fpn_bottleneck'},
    det={'loss_distill_rpn', 'loss_distill_roi', 'loss_distill_neck'},
)


class Dataset(list):
    """Images in memory with the names of their classes."""

    metainfo: ClassVar[dict] = dict(classes=('ground', 'thing'))


def make_runner(tiny, folder, task, hook, iters=2, model=None, **kwargs):
    torch.manual_seed(0)
    data = Dataset(tiny.sample(task, i) for i in range(2 * iters))

    def collate(items):
        return {key: [item[key] for item in items] for key in ('inputs', 'data_samples')}

    arguments = dict(
        model=model or tiny.build(task),
        work_dir=str(folder),
        train_dataloader=DataLoader(data, 2, collate_fn=collate),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3)),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=iters),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint=dict(type='CheckpointHook', interval=1, by_epoch=False),
        ),
        custom_hooks=[dict(type='mmdynsparse.SparsityHook'), hook],
        default_scope=tiny.SCOPES[task],
        log_processor=dict(by_epoch=False),
        visualizer=dict(type='Visualizer', vis_backends=[]),
        randomness=dict(seed=0),
        experiment_name=f'{folder}_{iters}_{kwargs.get("resume")}'.replace('/', '_'),
    )
    return Runner(**arguments | kwargs)


@pytest.fixture
def start(tmp_path, tiny):
    """Function that begins a training and hands out model and hook, as in the first iteration."""
    hooks = []

    def begin(task, model=None, **arguments):
        hook = DistillationHook(**arguments)
        runner = make_runner(tiny, tmp_path, task, hook, model=model)
        runner._train_loop = runner.build_train_loop(runner._train_loop)
        hook.before_train(runner)
        hooks.append((hook, runner))
        return runner.model, hook

    yield begin
    for hook, runner in hooks:
        hook.after_train(runner)


def losses_of(tiny, model, task, indices=(0, 1), **kwargs):
    # Every second image is smaller and padded to the size of the others.
    sizes = [(64 - 16 * (i % 2), 64) for i in indices]
    pairs = zip(indices, sizes, strict=True)
    samples = [tiny.sample(task, i, size, **kwargs) for i, size in pairs]
    batch = {key: [sample[key] for sample in samples] for key in ('inputs', 'data_samples')}
    return model(**model.data_preprocessor(batch, True), mode='loss')


def distilled(losses):
    return {name: value for name, value in losses.items() if 'distill' in name}


@pytest.mark.parametrize('task', ['seg', 'det'])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(task, start, tiny):
    model, _ = start(task, features=FEATURES[task])
    model.eval()
    model.backbone.set_keep_ratio(1.0)
    same = distilled(losses_of(tiny, model, task))
    assert same.keys() == LOSSES[task]
    assert all(value.item() < 1e-6 for value in same.values())
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    other = distilled(losses_of(tiny, model, task))
    assert all(value.item() > 1e-5 for value in other.values())
    sum(other.values()).backward()
    assert model.backbone.patch_embed.projection.weight.grad.abs().max() > 0


def test_hard_labels_of_a_teacher(start, tiny):
    """Weighted cross-entropy with the teacher's classes, where labels are not ignored."""
    model, hook = start('seg', logit_weight=0.5, hard=True, features={})
    model.eval()
    perturb(model)
    out = {}
    for key, part in dict(student=model, teacher=hook._teacher).items():
        part.decode_head.conv_seg.register_forward_hook(
            lambda m, args, logits, key=key: out.__setitem__(key, logits.detach())
        )
    losses = distilled(losses_of(tiny, model, 'seg', indices=(0, 2), ignored=0))
    expected = torch.nn.functional.cross_entropy(out['student'], out['teacher'].argmax(1))
    assert losses['loss_distill_logits'].item() == pytest.approx(0.5 * expected.item(), rel=1e-5)


def vit_config(tiny, **backbone):
    cfg = tiny.config('seg')
    cfg.backbone = dict(
        type='mmdynsparse.SparseVisionTransformer',
        img_size=64,
        embed_dims=16,
        num_layers=4,
        num_heads=2,
        out_indices=(1, 3),
        sparsity=dict(keep_ratio=0.7),
    )
    cfg.backbone.update(backbone)
    head = dict(in_channels=16, in_index=1, channels=8, num_convs=1, num_classes=2)
    cfg.decode_head = dict(head, type='FCNHead', loss_decode=cfg.decode_head.loss_decode)
    return cfg


def vit(tiny, **backbone):
    """A segmentor with a vision transformer of 4 layers and 16 tokens."""
    init_default_scope('mmseg')
    return MODELS.build(vit_config(tiny, **backbone))


def test_tokens_of_a_vision_transformer(start, tiny):
    """As published: of the last map, where the last decision keeps."""
    features = dict(backbone=dict(weight=[0, 0.5], kept_only=True))
    model, hook = start('seg', vit(tiny), logit_weight=0, features=features)
    perturb(model)
    outs = []
    for part in (model, hook._teacher):
        part.backbone.register_forward_hook(lambda m, args, out: outs.append(out))
    losses = losses_of(tiny, model, 'seg', (0, 2))
    student, teacher = outs
    error = (student[1] - teacher[1]).square().mean(1).flatten(1)
    kept = [mask > 0 for mask in student.decisions[-1].mask]
    assert all(0 < mask.sum() < len(mask) for mask in kept)
    means = [error[i, mask].mean() for i, mask in enumerate(kept)]
    torch.testing.assert_close(losses['loss_distill_backbone'], 0.5 * sum(means) / 2)


def perturb(model):
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)


SAIT = dict(keep_ratio=0.5, locations={0: (2,)}, predictor=dict(type='mmdynsparse.AttentionScore'))
ALONE = dict(logit_weight=0, features={})
IMPORTANCE = 'loss_distill_importance'


@pytest.mark.parametrize('keep_ratio', [0.5, 1.0])
@pytest.mark.parametrize('target', ['mean', 'cls', 'entropy'])
def test_importance_of_tokens(target, keep_ratio, start, tiny):
    """It trains the layers up to the one before the decision, in dense steps too."""
    importance = dict(weight=2.0, target=target)
    model, hook = start('seg', vit(tiny, sparsity=SAIT), **ALONE, importance=importance)
    perturb(model)
    model.backbone.set_keep_ratio(keep_ratio)
    losses, seen = [], {}
    for name, module in (('ln1', 'backbone.layers.3.ln1'), ('logits', 'decode_head.conv_seg')):
        module = hook._teacher.get_submodule(module)
        module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: out}))
    for indices in ((0, 2, 4, 6), (0, 2), (4, 6)):
        losses.append(losses_of(tiny, model, 'seg', indices)[IMPORTANCE])
        if len(indices) == 4:
            scores = model.backbone.decisions[0].scores
            shares = expected_importance(hook._teacher.backbone, target, seen)
    expected = 2 * (shares * (shares.log() - scores)).sum(1).mean() / math.log(16)
    torch.testing.assert_close(losses[0], expected)
    torch.testing.assert_close(losses[0], (losses[1] + losses[2]) / 2)  # however a batch is split
    losses[0].backward()
    grads = [layer.attn.attn.in_proj_weight.grad for layer in model.backbone.layers]
    assert all(grad.abs().max() > 0 for grad in grads[:2]) and grads[2:] == [None, None]
    assert all(p.grad is None for p in hook._teacher.parameters())


def expected_importance(backbone, target, seen):
    if target == 'entropy':
        probs = seen['logits'].softmax(1)
        entropy = -(probs * probs.log()).sum(1).flatten(1) + 1e-3
        return entropy / entropy.sum(1, keepdim=True)
    m = backbone.layers[3].attn.attn
    qkv = torch.nn.functional.linear(seen['ln1'], m.in_proj_weight, m.in_proj_bias)
    q, k, _ = qkv.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1).mean(1)
    received = (weights[:, 0] if target == 'cls' else weights.mean(1))[:, 1:]
    return received / received.sum(1, keepdim=True)


def test_importance_by_a_dense_teacher_of_mmseg(start, tmp_path, tiny):
    """It says what a copy of the student says that has its weights."""
    student, importance = vit(tiny, sparsity=SAIT), dict(target='cls')
    torch.save(student.state_dict(), tmp_path / 'dense.pth')
    cfg = vit_config(tiny, type='VisionTransformer')
    del cfg.backbone.sparsity
    named = dict(config=dict(model=cfg, default_scope='mmseg'), checkpoint=tmp_path / 'dense.pth')
    named['checkpoint'] = str(named['checkpoint'])
    losses = []
    for teacher in (named, 'self'):
        student = vit(tiny, sparsity=SAIT)
        student.load_state_dict(torch.load(tmp_path / 'dense.pth'))
        model, _ = start('seg', student, teacher=teacher, **ALONE, importance=importance)
        losses.append(losses_of(tiny, model, 'seg')[IMPORTANCE])
    assert losses[0] > 0
    torch.testing.assert_close(*losses)


def test_importance_in_a_training(tmp_path, tiny):
    hook, seen = DistillationHook(features={}, importance=dict(weight=0.5)), []
    hook.after_train_iter = lambda *args, outputs, **kwargs: seen.append(outputs)
    make_runner(tiny, tmp_path, 'seg', hook, model=vit(tiny, sparsity=SAIT)).train()
    for outputs in seen:
        assert outputs[IMPORTANCE] > 0 and 'loss_keep_ratio' not in outputs
        assert outputs['keep_rate_0'] == 0.5


@pytest.mark.parametrize(
    'model, importance, match',
    [
        (None, {}, 'needs a SparseVisionTransformer .* got a SparseSwinTransformer without'),
        (dict(), {}, r'sparsity.predictor .*AttentionScore.* got a SparseVisionTransformer with'),
        (
            dict(sparsity=SAIT, with_cls_token=False),
            dict(target='cls'),
            "'cls' needs a teacher with a class token, got with_cls_token=False",
        ),
    ],
)
def test_models_without_importance(model, importance, match, tmp_path, tiny):
    """They are refused before the first iteration."""
    hook = DistillationHook(**ALONE, importance=importance)
    model = None if model is None else vit(tiny, **model)
    with pytest.raises(ValueError, match=match):
        make_runner(tiny, tmp_path, 'seg', hook, model=model).train()


@pytest.mark.parametrize(
    'changes, match',
    [
        (dict(patch_size=8), 'a teacher with as many tokens as the student, 64, got 256'),
        (None, "'mean' needs a teacher with a VisionTransformer as backbone, got a SwinTransf"),
    ],
)
def test_teachers_without_importance(changes, match, tmp_path, tiny):
    cfg = tiny.config('seg', dense=True) if changes is None else vit_config(tiny, **changes)
    init_default_scope('mmseg')
    torch.save(MODELS.build(cfg).state_dict(), tmp_path / 'teacher.pth')
    config = dict(model=cfg, default_scope='mmseg')
    teacher = dict(config=config, checkpoint=str(tmp_path / 'teacher.pth'))
    hook = DistillationHook(teacher, **ALONE, importance={})
    with pytest.raises(ValueError, match=match):
        make_runner(tiny, tmp_path, 'seg', hook, model=vit(tiny, sparsity=SAIT)).train()


@pytest.mark.parametrize('logit_weight', [0, 0.5])
def test_features_of_regions(logit_weight, start, tiny):
    names = 'roi_head.bbox_roi_extractor', 'roi_head.bbox_head.shared_fcs.0'
    model, _ = start('det', logit_weight=logit_weight, features=dict.fromkeys(names, 0.5))
    perturb(model)
    losses = losses_of(tiny, model, 'det')
    assert all(losses[f'loss_distill_{name.replace(".", "_")}'] > 0 for name in names)


def test_regions_that_a_sampler_tries_are_not_compared(start, tiny):
    """Student and teacher see the same regions, and say the same of them."""
    changes = {'train_cfg.rcnn.sampler.type': 'OHEMSampler'}
    features = {'roi_head.bbox_head': 1.0}
    model, hook = start('det', tiny.build('det', changes=changes), features=features)
    model.eval().backbone.set_keep_ratio(1.0)
    regions = [], []
    for part, counts in zip((model, hook._teacher), regions, strict=True):
        part.roi_head.bbox_head.register_forward_hook(
            lambda m, args, out, counts=counts: counts.append(len(out[0]))
        )
    losses = distilled(losses_of(tiny, model, 'det'))
    assert len(regions[0]) == 3 and regions[1] == regions[0][-1:]
    assert len(losses) == 3 and all(value.item() < 1e-6 for value in losses.values())


def test_classes_that_are_decisions_of_their_own(start, tiny):
    """A shift of all logits changes their sigmoids, not their softmax."""
    losses = []
    for sigmoid in (False, True):
        changes = {'decode_head.loss_decode.use_sigmoid': sigmoid}
        model, _ = start('seg', tiny.build('seg', changes=changes), features={})
        model.eval().backbone.set_keep_ratio(1.0)
        model.decode_head.conv_seg.bias.data += 5
        losses.append(losses_of(tiny, model, 'seg')['loss_distill_logits'].item())
    assert losses[0] < 1e-6 < 0.1 < losses[1]


def test_features_beside_a_head_that_needs_labels(start, tiny):
    """Those with queries, such as mmdet's that mmseg takes over, do not run on maps alone."""
    model = tiny.build('seg')
    forward = model.decode_head.forward
    model.decode_head.num_queries = 10
    model.decode_head.forward = lambda x, samples: forward(x)
    model.decode_head.loss = lambda x, samples, cfg: dict(loss_ce=forward(x).square().mean())
    model, _ = start('seg', model, logit_weight=0, features=dict(backbone=1.0))
    perturb(model)
    assert losses_of(tiny, model, 'seg')['loss_distill_backbone'] > 0


@pytest.mark.parametrize('with_cp', [False, True])
def test_a_module_that_runs_once_for_each_level(with_cp, start, tiny):
    """All levels are compared; checkpointed activations do not run it again."""
    model = tiny.build('det', with_cp=with_cp)
    model, hook = start('det', model, features={'rpn_head.rpn_conv': 1.0})
    perturb(model)
    levels = [], []
    for part, maps in zip((model, hook._teacher), levels, strict=True):
        part.rpn_head.rpn_conv.register_forward_hook(
            lambda m, args, out, maps=maps: maps.append(out)
        )
    losses = losses_of(tiny, model, 'det', (0, 2))
    assert len(levels[0]) == 5
    errors = [(s - t).square().mean() for s, t in zip(*levels, strict=True)]
    torch.testing.assert_close(losses['loss_distill_rpn_head_rpn_conv'], sum(errors) / 5)
    losses['loss_distill_rpn_head_rpn_conv'].backward()
    assert not hook._student_calls.stop()


def test_images_of_another_dtype_than_the_teacher(start, tiny):
    """A sharded student in mixed precision gets its images in bfloat16, without autocast."""
    model, hook = start('seg')
    samples = [tiny.sample('seg', i) for i in range(2)]
    batch = {key: [sample[key] for sample in samples] for key in ('inputs', 'data_samples')}
    data = model.data_preprocessor(batch, True)
    model.bfloat16()
    losses = model(data['inputs'].bfloat16(), data['data_samples'], mode='loss')
    assert next(hook._teacher.parameters()).dtype == torch.float32
    assert all(value.isfinite() for value in distilled(losses).values())


def test_the_head_of_the_student_says_what_is_ignored(start, tiny):
    model, hook = start('seg', features={})
    perturb(model.eval())
    before = losses_of(tiny, model, 'seg', ignored=0.0)['loss_distill_logits']
    hook._teacher.decode_head.ignore_index = 0
    after = losses_of(tiny, model, 'seg', ignored=0.0)['loss_distill_logits']
    torch.testing.assert_close(before, after)


@pytest.mark.parametrize('task', ['seg', 'det'])
def test_weights_that_a_copy_of_the_student_needs(task, tmp_path, tiny):
    """A head of other classes, and a checkpoint of the backbone alone."""
    path, hook = tmp_path / 'dense.pth', dict(type='mmdynsparse.DistillationHook')
    weights = tiny.build(task, dense=True).state_dict()
    last = dict(seg='decode_head.conv_seg.weight', det='roi_head.bbox_head.fc_cls.weight')[task]
    head = last.rsplit('.', 2)[0]
    start = dict(iters=1, load_from=str(path))

    def train(weights, folder, **arguments):
        torch.save(weights, path)
        make_runner(tiny, tmp_path / folder, task, hook | arguments, **start).train()

    train(weights, 'whole')
    match = rf"teacher 'self' needs all weights of {head} .* got 1 of .* such as {last}: name"
    with pytest.raises(ValueError, match=match):
        train(weights | {last: weights[last][:1]}, 'classes')
    backbone = {key: value for key, value in weights.items() if key.startswith('backbone.')}
    with pytest.raises(ValueError, match="teacher 'self' needs all weights of"):
        train(backbone, 'backbone')
    assert not (tmp_path / 'backbone' / 'distillation_teacher.pth').exists()
    train(backbone, 'features', logit_weight=0)
    if task == 'det':
        with pytest.raises(
            ValueError, match=r'weights of neck .* \(logit_weight=0, or features wi'
        ):
            train(backbone, 'neck', logit_weight=0, features=dict(neck=1.0))


@pytest.mark.parametrize('task', ['seg', 'det'])
def test_training(task, tmp_path, tiny):
    hook = DistillationHook(features=FEATURES[task])
    runner = make_runner(tiny, tmp_path, task, hook)
    keys = set(runner.model.state_dict())
    teachers, seen = [], []

    def watch(runner, batch_idx, data_batch=None, outputs=None):
        teachers.append(hook._teacher)
        seen.append(outputs)

    hook.after_train_iter = watch
    runner.train()
    assert all(LOSSES[task] <= outputs.keys() for outputs in seen)
    for outputs in seen:
        total = sum(value for name, value in outputs.items() if 'loss' in name and name != 'loss')
        torch.testing.assert_close(outputs['loss'], total)
    teacher = teachers[0]
    assert teachers[1] is teacher and not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not {id(m) for m in teacher.modules()} & {id(m) for m in runner.model.modules()}
    saved = torch.load(tmp_path / 'iter_2.pth', weights_only=False)
    assert set(saved['state_dict']) == keys
    # The student has moved, the teacher is what the student was.
    start = torch.load(tmp_path / 'distillation_teacher.pth')
    assert all(torch.equal(value, start[name]) for name, value in teacher.state_dict().items())
    assert any(not torch.equal(value, start[name]) for name, value in saved['state_dict'].items())
    assert not runner.model._forward_hooks and not runner.model._forward_pre_hooks
    assert all('forward' not in m.__dict__ for m in runner.model.modules())
    assert hook._teacher is None


def replaced(model):
    return [name for name, module in model.named_modules() if 'forward' in vars(module)]


@pytest.mark.parametrize('task', ['seg', 'det'])
def test_a_copy_made_between_iterations_runs_its_own_weights(task, tmp_path, tiny):
    """As that of a hook which averages weights."""
    hook = DistillationHook(features=FEATURES[task])
    differences = []

    def copy(runner, *args, **kwargs):
        assert not replaced(runner.model) and not replaced(hook._teacher)
        model = deepcopy(runner.model).eval()
        image = torch.ones(1, 3, 64, 64)
        before = model.extract_feat(image)[0]
        perturb(model)
        differences.append((model.extract_feat(image)[0] - before).abs().max())

    hook.after_train_iter = copy
    make_runner(tiny, tmp_path, task, hook).train()
    assert len(differences) == 2 and min(differences) > 1e-3


def test_a_forward_that_fails_leaves_nothing_behind(start, tiny):
    model, hook = start('seg')
    before = distilled(losses_of(tiny, model.eval(), 'seg'))
    failing = model.decode_head.register_forward_pre_hook(lambda *args: 1 / 0)
    model.decode_head.loss = lambda feats, *args: model.decode_head(feats)
    with pytest.raises(ZeroDivisionError):
        losses_of(tiny, model, 'seg')
    assert not replaced(model) and not hook._student_calls.stop()
    failing.remove()
    del model.decode_head.loss
    assert distilled(losses_of(tiny, model, 'seg')) == before


def compiled(model):
    model.backbone.compile(backend='eager')


def checkpointed(model):
    turn_on_activation_checkpointing(model, ['backbone', 'decode_head'])


@torch.compiler.set_stance('force_eager')  # faster; what a call runs is the same
@pytest.mark.parametrize('change', [compiled, checkpointed])
def test_a_copy_of_the_student_keeps_its_weights(change, start, tiny):
    """Also of one whose calls, compiled or replaced by others, are bound to the student."""
    model = tiny.build('seg')
    change(model)
    model, _ = start('seg', model)
    model.eval().backbone.set_keep_ratio(1.0)
    same = distilled(losses_of(tiny, model, 'seg'))
    assert all(value < 1e-6 for value in same.values())
    perturb(model)
    assert all(value > 1e-4 for value in distilled(losses_of(tiny, model, 'seg')).values())


@pytest.mark.slow
def test_a_compiled_student_is_compiled_once(start, tiny):
    torch._dynamo.reset()
    small = dict(depths=(1, 1, 1, 1), sparsity=dict(keep_ratio=0.5, locations={2: (0,)}))
    model, backend = tiny.build('seg', **small), CompileCounterWithBackend('eager')
    model.backbone.compile(backend=backend)
    model, _ = start('seg', model)
    counts = []
    for i in range(3):
        losses = losses_of(tiny, model, 'seg', (2 * i, 2 * i + 1))
        counts.append(backend.frame_count)
    assert losses['loss_distill_backbone'] > 0
    assert counts[0] == counts[2], counts


def test_no_loss_outside_of_training(start):
    model, hook = start('seg')
    model.eval()
    inputs = torch.randn(1, 3, 64, 64)
    assert isinstance(model(inputs, mode='tensor'), torch.Tensor)
    assert not hook._student_calls.stop() and not hook._teacher_calls.stop()


def test_ignored_pixels_teach_nothing(start, tiny):
    model, _ = start('seg', features={})
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    name = 'loss_distill_logits'
    assert losses_of(tiny, model, 'seg', ignored=1.0)[name] == 0
    assert losses_of(tiny, model, 'seg', ignored=0.5)[name] > 0


@pytest.mark.parametrize('task', ['seg', 'det'])
def test_losses_do_not_depend_on_how_a_batch_is_split(task, start, tiny):
    model, _ = start(task, features=FEATURES[task])
    model.eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    torch.manual_seed(0)
    whole = distilled(losses_of(tiny, model, task, (0, 1, 2, 3)))
    parts = [distilled(losses_of(tiny, model, task, pair)) for pair in ((0, 1), (2, 3))]
    names = LOSSES[task] - {'loss_distill_roi'}  # regions are sampled at random
    for name in names:
        torch.testing.assert_close(whole[name], (parts[0][name] + parts[1][name]) / 2)


@pytest.mark.parametrize('kind', ['SwinTransformer', 'SparseSwinTransformer'])
@pytest.mark.parametrize('task', ['seg', 'det'])
def test_teacher_from_a_config_and_a_dense_checkpoint(task, kind, start, tmp_path, tiny):
    """The teacher keeps everything, whatever its config says."""
    dense = tiny.build(task, dense=True)
    path = tmp_path / 'dense.pth'
    torch.save(dict(state_dict=dense.state_dict(), meta={}), path)
    model = tiny.build(task)
    keys = model.load_state_dict(dense.state_dict(), strict=False)
    assert not keys.unexpected_keys
    model_cfg = tiny.config(task, dense=kind == 'SwinTransformer')
    config = dict(model=model_cfg, default_scope=tiny.SCOPES[task])
    model, hook = start(task, model, teacher=dict(config=config, checkpoint=str(path)))
    assert type(hook._teacher.backbone).__name__ == kind
    model.eval()
    model.backbone.set_keep_ratio(1.0)
    assert all(value.item() < 1e-6 for value in distilled(losses_of(tiny, model, task)).values())


def test_images_of_one_channel(start, tiny):
    cfg = tiny.config('seg', in_channels=1)
    cfg.data_preprocessor.update(mean=[120.0], std=[60.0], bgr_to_rgb=False)
    init_default_scope('mmseg')
    model, _ = start('seg', MODELS.build(cfg))
    batch = [tiny.sample('seg', i) for i in range(2)]
    data = {key: [sample[key] for sample in batch] for key in ('inputs', 'data_samples')}
    data['inputs'] = [image[:1] for image in data['inputs']]
    losses = model(**model.data_preprocessor(data, True), mode='loss')
    assert distilled(losses)['loss_distill_backbone'] > 0


def test_mixed_precision_is_that_of_the_student(start, tiny):
    model, hook = start('seg')
    dtypes = []
    conv = hook._teacher.decode_head.fpn_bottleneck.conv
    conv.register_forward_hook(lambda m, args, out: dtypes.append(out.dtype))
    wrapper = BFloat16OptimWrapper(torch.optim.SGD(model.parameters(), 0.1))
    with wrapper.optim_context(model):
        losses = losses_of(tiny, model, 'seg')
    assert dtypes == [torch.bfloat16]
    assert all(v.dtype == torch.float32 and v.isfinite() for v in distilled(losses).values())


def test_the_teacher_runs_once_and_without_gradients(start, tiny):
    model, hook = start('seg')
    calls = []
    hook._teacher.backbone.register_forward_hook(
        lambda m, args, outs: calls.append(any(out.requires_grad for out in outs))
    )
    losses_of(tiny, model, 'seg')
    assert calls == [False]


def test_resume_has_the_same_teacher(tmp_path, tiny):
    make_runner(tiny, tmp_path, 'seg', DistillationHook(), iters=1).train()
    hook = DistillationHook()
    teachers = []
    hook.after_train_iter = lambda *args, **kwargs: teachers.append(hook._teacher.state_dict())
    make_runner(tiny, tmp_path, 'seg', hook, iters=2, resume=True).train()
    start = torch.load(tmp_path / 'distillation_teacher.pth')
    assert len(teachers) == 1
    assert all(torch.equal(value, start[name]) for name, value in teachers[0].items())
    (tmp_path / 'distillation_teacher.pth').unlink()
    with pytest.raises(ValueError, match='resumed with the file distillation_teacher'):
        make_runner(tiny, tmp_path, 'seg', DistillationHook(), iters=3, resume=True).train()


def test_a_random_teacher_is_warned_of(start, warnings_of):
    texts = warnings_of(runs)
    start('seg')
    assert any('random weights' in text for text in texts)


@pytest.mark.parametrize(
    'arguments, match',
    [
        (dict(teacher='dense'), "teacher must be 'self' or dict.*got 'dense'"),
        (dict(teacher=dict(config='a.py')), 'teacher must be .*a.py'),
        (dict(logit_weight=-1), 'logit_weight must be at least 0, got -1'),
        (dict(features=dict(neck=-2)), r"features\['neck'\] must be at least 0, got -2"),
        (dict(logit_weight=0, features=dict(neck=0.0)), r"above 0, got 0 and {'neck': 0.0}; leave"),
        (dict(logit_weight=0, features={}), 'logit_weight or a weight in .* must be above 0'),
        (dict(temperature=0), 'temperature must be above 0, got 0'),
        (dict(hard=1), 'hard must be True or False, got 1'),
        (dict(hard=True, temperature=2.0), 'hard=True must have .* temperature 1, got 0.5 and 2.0'),
        (dict(hard=True, logit_weight=0), 'hard=True must have a logit_weight above 0'),
        (dict(features=dict(neck='1')), r"features\['neck'\] must be at least 0, got '1'"),
        (dict(features=dict(neck=float('nan'))), r"features\['neck'\] must be at least 0, got nan"),
        (dict(features=dict(neck=[0, -1])), r'must be at least 0 for each map, got \[0, -1\]'),
        (dict(features=dict(neck=[])), r'must be at least 0 for each map, got \[\]'),
        (dict(features=dict(neck=(0.5, None))), r'at least 0 for each map, got \(0.5, None\)'),
        (
            dict(logit_weight=0, features=dict(neck=[0, 0])),
            r'above 0, got 0 and .*\[0, 0\]',
        ),
        (dict(features=dict(neck={})), r"features\['neck'\] takes weight and .*, got {}"),
        (dict(features=dict(neck=dict(weight=1, kept=1))), r"\['neck'\] takes weight and .*'kept'"),
        (dict(features=dict(neck=dict(weight=-1))), r"features\['neck'\].weight must be .* got -1"),
        (dict(importance=1.0), r'importance must be None or dict.* got 1.0'),
        (dict(importance=dict(kind='mean')), r'importance must be .* got .*kind'),
        (dict(importance=dict(weight=-1)), 'importance.weight must be at least 0, got -1'),
        (dict(importance=dict(target='max')), r"one of \('mean', 'cls', 'entropy'\), got 'max'"),
        (dict(**ALONE, importance=dict(weight=0)), 'in features or importance must be above 0'),
        (dict(features=dict(neck=dict(weight=1, kept_only=1))), 'must be True or False, got 1'),
        (dict(features=dict(neck=dict(weight=dict(weight=1)))), "at least 0, got {'weight': 1}"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        DistillationHook(**arguments)


@pytest.mark.parametrize(
    'name, match',
    [
        ('decode_heads', "name modules of EncoderDecoder .in .*backbone.*got 'decode_heads'"),
        ('decode_head.loss_decode', "modules that run up to the logits .*got 'decode_head.loss_d"),
    ],
)
def test_bad_module_names(name, match, tmp_path, tiny):
    hook = DistillationHook(features={name: 1.0})
    with pytest.raises(ValueError, match=match):
        make_runner(tiny, tmp_path, 'seg', hook).train()


@pytest.mark.parametrize(
    'features, match',
    [
        (dict(backbone=[0.5]), r"features\['backbone'\] must have a weight for each of 4 maps"),
        (
            dict(decode_head=dict(weight=1, kept_only=True)),
            r"kept_only must .*\['decode_head'\]",
        ),
    ],
)
def test_weights_that_do_not_fit_the_maps(features, match, tmp_path, tiny):
    """They are an error before the first iteration."""
    hook, begun = DistillationHook(features=features), []
    hook.before_train_iter = lambda *args, **kwargs: begun.append(args)
    with pytest.raises(ValueError, match=match):
        make_runner(tiny, tmp_path, 'seg', hook).train()
    assert not begun


def _other(tiny, **changes):
    cfg = tiny.config('seg', dense=True)
    for key, value in changes.items():
        part, name = key.split('__')
        cfg[part][name] = value
    return cfg


@pytest.mark.parametrize(
    'changes, match',
    [
        (dict(decode_head__num_classes=5), '2 classes of the student in decode_head, got 5'),
        (dict(data_preprocessor__mean=[1.0] * 3), r'mean, std .*120.0.* got .*1.0'),
        (dict(data_preprocessor__bgr_to_rgb=False), r'channel order .*True.*got .*False'),
        (dict(decode_head__channels=8), r"same width and stride.*'decode_head.fpn_bottleneck'"),
        (dict(backbone__strides=(4, 2, 2, 1)), "same width and stride.*'backbone'"),
    ],
)
def test_a_teacher_that_does_not_fit(changes, match, tmp_path, tiny):
    config = dict(model=_other(tiny, **changes), default_scope='mmseg')
    tiny.build('seg')
    path = tmp_path / 'teacher.pth'
    torch.save(MODELS.build(config['model']).state_dict(), path)
    features = {'decode_head.fpn_bottleneck': 1.0} if 'decode_head__channels' in changes else None
    hook = DistillationHook(dict(config=config, checkpoint=str(path)), features=features)
    with pytest.raises(ValueError, match=match):
        make_runner(tiny, tmp_path, 'seg', hook).train()


def test_a_teacher_of_another_crop_is_warned_of(tmp_path, warnings_of, tiny):
    texts = warnings_of(runs)
    config = dict(model=_other(tiny, data_preprocessor__size=(32, 32)), default_scope='mmseg')
    path = tmp_path / 'teacher.pth'
    torch.save(tiny.build('seg', dense=True).state_dict(), path)
    hook = DistillationHook(dict(config=config, checkpoint=str(path)))
    make_runner(tiny, tmp_path, 'seg', hook, iters=1).train()
    assert any('crop (32, 32)' in text and '(64, 64)' in text for text in texts)


def test_files_of_the_teacher(tmp_path, tiny):
    config = dict(model=tiny.config('seg', dense=True), default_scope='mmseg')
    path = tmp_path / 'teacher.pth'
    for checkpoint, meta, match in (
        ({'backbone.weight': torch.zeros(1)}, {}, 'checkpoint must fit .*missing keys'),
        *(
            (
                tiny.build('seg', dense=True).state_dict(),
                meta,
                r"classes \('ground', 'thing'\), got \('cat', 'dog'\)",
            )
            for meta in (
                dict(dataset_meta=dict(classes=('cat', 'dog'))),
                dict(CLASSES=('cat', 'dog')),  # of older versions
            )
        ),
    ):
        torch.save(dict(state_dict=checkpoint, meta=meta), path)
        hook = DistillationHook(dict(config=config, checkpoint=str(path)))
        with pytest.raises(ValueError, match=match):
            make_runner(tiny, tmp_path, 'seg', hook).train()
    for teacher, match in (
        (dict(config='none.py', checkpoint=str(path)), "teacher.config must .*got 'none.py'"),
        (dict(config=config, checkpoint='none.pth'), "teacher.checkpoint must .*got 'none.pth'"),
    ):
        with pytest.raises(ValueError, match=match):
            make_runner(tiny, tmp_path, 'seg', DistillationHook(teacher)).train()


def test_models_without_logits_that_can_be_compared(training):
    with pytest.raises(ValueError, match=r'logit_weight needs a segmentor .*got Model'):
        training(DistillationHook())
    log = training(DistillationHook(logit_weight=0, features=dict(backbone=3.0)), iters=2).log
    assert log[1]['loss_distill_backbone'] > 0


def test_a_head_that_returns_several_maps_in_training(start, tiny):
    model, _ = start('seg')
    head = model.decode_head
    head.conv_seg.register_forward_hook(lambda m, args, out: (out, out))
    head.loss_by_feat = lambda logits, samples: dict(loss=logits[0].sum())
    with pytest.raises(ValueError, match=r'one map of logits in training .* a tuple of UPerHead'):
        losses_of(tiny, model, 'seg')
