"""Distillation from a dense teacher (Rao et al., T-PAMI 2023, section 3.4)."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ...models.calls import Call, CallRecorder
from ...registry import HOOKS
from ..distillation import (
    IN_ROI_HEAD,
    LOSS_NAMES,
    ROI,
    ROI_INPUT,
    SEGMENTOR,
    Batch,
    feature_loss,
    find_module,
    is_two_stage,
    logit_heads,
    logit_loss,
    parse_weight,
    run_parts,
    second_stage,
)
from ..importance import (
    importance_loss,
    importance_source,
    importance_target,
    parse_importance,
)
from ..runs import bare_model
from ..teacher import check_teacher, copy_student, load_teacher

# Side of the empty image, in px, on which both models are compared before training.
EMPTY_IMAGE = 128


@HOOKS.register_module()
class DistillationHook(Hook):
    """Train a sparse model to compute what a dense one does.

    In training the model's loss dict gains ``loss_distill_logits`` (of a segmentor's pixels) or
    ``loss_distill_rpn`` and ``loss_distill_roi`` (of the anchors, and of the regions that the
    detector sampled), ``loss_distill_NAME`` for the maps of each module in ``features``, with
    underscores for dots, and ``loss_distill_importance``. They are weighted and are means over
    images, so they pass through AMP, gradient accumulation and distributed training like every
    other loss.

    The teacher sees the student's augmented and normalized batch, in eval mode, without gradients
    and under the student's autocast. It belongs to this hook alone: no checkpoint has it, nothing
    wraps it, and ``model.train()`` does not reach it.

    Args:
        teacher: dict(config=..., checkpoint=...), or 'self' for the student's own weights at the
            start of the training, with everything kept. Those are also written to
            ``distillation_teacher.pth`` in the work dir, for resuming. Defaults to 'self'.
        logit_weight: Weight of the divergence of each kind of logits, >= 0. Padding and ignored
            pixels are left out. Defaults to 0.5, the published one.
        temperature: Divides the logits, > 0; the loss is multiplied by its square. Defaults to 1.
        features: Weights, >= 0, of the mean squared errors of the maps of modules by name, such as
            'backbone', 'neck', 'decode_head.bottleneck' or 'roi_head.bbox_roi_extractor'. A number
            weighs the mean over all maps that a module returns. A list has one weight for each
            map, and the weighted errors are added: of a hierarchical backbone only the last map
            was distilled, [0, 0, 0, 0.5]. dict(weight=..., kept_only=True) leaves out the
            locations that the last decision of the module's forward drops, as was published for
            vision transformers (DistillDiffPruningLoss in losses.py of DynamicViT). Defaults to
            None, dict(backbone=0.5).
        importance: For a backbone whose tokens an ``AttentionScore`` scores,
            dict(weight=1.0, target='mean'): the weight, >= 0, of the divergence of the scores from
            what the teacher finds important. That is the attention which tokens receive in its
            last layer, from all tokens ('mean') or the class token ('cls'), or the entropy of its
            pixels ('entropy'). Defaults to None, without.
        hard: Whether the teacher's most likely class is a label, as SPViT fine-tunes, in place of
            its probabilities; the loss is then the cross-entropy. Defaults to False.

    Raises:
        ValueError: If an argument is outside its range or all weights are 0, or, before the first
            iteration, teacher and student do not fit each other, a module does not exist or does
            not run, or the checkpoint lacks what 'self' is to teach.
    """

    def __init__(
        self,
        teacher: str | Mapping = 'self',
        logit_weight: float = 0.5,
        temperature: float = 1.0,
        features: Mapping[str, float | Sequence[float] | Mapping] | None = None,
        importance: Mapping | None = None,
        hard: bool = False,
    ) -> None:
        is_named = isinstance(teacher, Mapping) and set(teacher) == {'config', 'checkpoint'}
        if teacher != 'self' and not is_named:
            raise ValueError(
                f"teacher must be 'self' or dict(config=..., checkpoint=...), got {teacher!r}"
            )
        features = dict(backbone=0.5) if features is None else dict(features)
        if not logit_weight >= 0:
            raise ValueError(f'logit_weight must be at least 0, got {logit_weight!r}')
        weights = {n: parse_weight(f'features[{n!r}]', value) for n, value in features.items()}
        weights = {name: weight for name, weight in weights.items() if np.any(weight[0])}
        self.importance = parse_importance(importance)
        if not logit_weight and not weights and not self.importance:
            raise ValueError(
                'logit_weight or a weight in features or importance must be above 0, got '
                f'{logit_weight!r} and {features}; leave DistillationHook out to train '
                'without a teacher'
            )
        if not temperature > 0:
            raise ValueError(f'temperature must be above 0, got {temperature!r}')
        if not isinstance(hard, bool):
            raise ValueError(f'hard must be True or False, got {hard!r}')
        if hard and (temperature != 1 or not logit_weight):
            raise ValueError(
                'hard=True must have a logit_weight above 0 and the temperature 1, got '
                f'{logit_weight!r} and {temperature!r}'
            )
        self.teacher = teacher
        self.features = weights
        self.logit_weight = logit_weight
        self.temperature = temperature
        self.hard = hard
        self._student = self._teacher = self._loaded = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Note what the checkpoint holds."""
        weights = checkpoint.get('state_dict', checkpoint)
        # What is no state dict holds values without a shape.
        self._loaded = {
            name.removeprefix('module.'): getattr(value, 'shape', None)
            for name, value in weights.items()
        }

    def before_train(self, runner: Runner) -> None:
        """Make the teacher, compare it with the student and add the losses."""
        student = bare_model(runner)
        self._heads = logit_heads(student) if self.logit_weight else []
        names = {*self._heads, *self.features}
        if self.importance and self.importance[1] == 'entropy':
            names.add(SEGMENTOR)
        self._needs_rois = is_two_stage(student) and any(n.startswith(IN_ROI_HEAD) for n in names)
        self._names = sorted(names | ({ROI_INPUT, ROI} if self._needs_rois else set()))
        self._student, self._student_calls = student, self._recorder(student)
        if self.teacher == 'self':
            self._teacher, classes = copy_student(runner, sorted(names), self._loaded), None
        else:
            self._teacher, classes = load_teacher(**self.teacher)
        self._source = None
        if self.importance:
            self._source = importance_source(student, self._teacher, self.importance[1])
        self._teacher_calls = self._recorder(self._teacher, self._source)
        ours = getattr(runner.train_dataloader.dataset, 'metainfo', {}).get('classes')
        check_teacher(student, self._teacher, self._heads, (ours, classes))
        self._teacher.requires_grad_(False)
        self._teacher.eval()
        # Parts of a sharded model do not run on their own: the first batch compares those.
        if not isinstance(runner.model, FullyShardedDataParallel):
            self._compare_on_empty_image()
        self._handles = [
            student.register_forward_pre_hook(self._start_recording, with_kwargs=True),
            student.register_forward_hook(self._add_losses, with_kwargs=True, always_call=True),
        ]
        self._log_weights()

    def after_train(self, runner: Runner) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._student = self._teacher = self._student_calls = self._teacher_calls = None

    def _recorder(self, model: nn.Module, source: str | None = None) -> CallRecorder:
        names = {*self._names, *([source] if source else [])}
        return CallRecorder({name: find_module(model, name) for name in names})

    def _compare_on_empty_image(self) -> None:
        """Run both models on an empty image, so that what does not fit fails now."""
        student = self._student
        mean = getattr(student.data_preprocessor, 'mean', None)
        channels = 3 if mean is None else len(mean)
        image = next(student.parameters()).new_zeros(1, channels, EMPTY_IMAGE, EMPTY_IMAGE)
        corner = [[0, 0, 0, EMPTY_IMAGE / 2, EMPTY_IMAGE / 2]]
        rois = image.new_tensor(corner) if self._needs_rois else None
        training = student.training
        student.eval()
        with torch.no_grad():
            run = partial(run_parts, student, image, self._names, rois)
            self._losses(self._student_calls.record(run), image, ())
        student.train(training)

    def _log_weights(self) -> None:
        source = self.teacher if self.teacher == 'self' else self.teacher['checkpoint']
        weights = {LOSS_NAMES[head]: self.logit_weight for head in self._heads}
        for name, (weight, kept_only) in self.features.items():
            weights[name] = f'{weight} where kept' if kept_only else weight
        if self.importance:
            weights['importance'] = '{} by {}'.format(*self.importance)
        losses = ', '.join(f'{loss_name(name)} {weight}' for name, weight in weights.items())
        text = f'Distillation from {source}: {losses}, temperature {self.temperature}'
        print_log(text, logger='current')

    def _start_recording(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if kwargs.get('mode') == 'loss':
            self._student_calls.start()

    def _add_losses(
        self, model: nn.Module, args: tuple, kwargs: dict, losses: dict | None
    ) -> dict[str, Tensor] | None:
        calls = self._student_calls.stop()
        if losses is None or kwargs.get('mode') != 'loss':  # a forward that failed has no losses
            return None
        images = kwargs['inputs'] if 'inputs' in kwargs else args[0]
        samples = kwargs.get('data_samples') or ()
        return losses | self._losses(calls, images, samples)

    def _losses(
        self, calls: Sequence[Call], images: Tensor, samples: Sequence
    ) -> dict[str, Tensor]:
        """Losses for what was recorded of the student on a batch."""
        rois = None
        if self._needs_rois:
            calls, rois = second_stage(calls)
        batch = Batch(images, samples, rois)
        student, teacher = outputs_of(calls), outputs_of(self._run_teacher(images, rois))
        losses = {}
        for head in self._heads:
            module, outs = self._student.get_submodule(head), (student[head][-1], teacher[head][-1])
            value = logit_loss(head, module, *outs, batch, self.temperature, self.hard)
            losses[loss_name(LOSS_NAMES[head])] = self.logit_weight * value
        for name, weight in self.features.items():
            if not student[name] or not teacher[name]:
                raise ValueError(
                    'features must name modules that run up to the logits (backbone, neck, '
                    f"decode_head or rpn_head and roi_head.bbox_head), got '{name}'"
                )
            outs = student[name], teacher[name]
            losses[loss_name(name)] = feature_loss(name, *outs, batch, *weight)
        if self.importance:
            (weight, target), decisions = self.importance, self._student.backbone.decisions
            out, hw = teacher[self._source][-1], decisions[0].hw
            shares = importance_target(self._teacher.backbone, target, out, hw)
            losses[loss_name('importance')] = weight * importance_loss(decisions, shares)
        return losses

    def _run_teacher(self, images: Tensor, rois: Tensor | None) -> list[Call]:
        """Return the teacher's calls on a batch."""
        weight = next(self._teacher.parameters())
        if weight.device != images.device:
            # Not of the student's parameters, which sharding may keep elsewhere.
            self._teacher.to(images.device)
        if not torch.is_autocast_enabled(images.device.type):
            # The mixed precision of a sharded student has cast its inputs.
            images = images.to(weight.dtype)
            rois = None if rois is None else rois.to(weight.dtype)
        with torch.no_grad():
            run = partial(run_parts, self._teacher, images, self._names, rois)
            return self._teacher_calls.record(run)


def outputs_of(calls: Sequence[Call]) -> dict[str, list]:
    """Return the outputs of each module, in order."""
    outputs = defaultdict(list)
    for call in calls:
        outputs[call.name].append(call.out)
    return outputs


def loss_name(name: str) -> str:
    """Return the name of a loss in the log."""
    return f'loss_distill_{name.replace(".", "_")}'
