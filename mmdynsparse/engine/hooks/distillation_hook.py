"""Distillation from a dense teacher (Rao et al., T-PAMI 2023, section 3.4)."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ...registry import HOOKS
from .. import distillation as ops
from ..parameters import bare_model
from ..teacher import check_teacher, copy_student, load_teacher

LOSS_NAMES = {ops.SEGMENTOR: 'logits', ops.RPN: 'rpn', ops.ROI: 'roi'}
ROI_PARTS = f'{ops.ROI_HEAD}.'
# Side of the image, in px, on which both models are compared before training.
PROBE = 128


@HOOKS.register_module()
class DistillationHook(Hook):
    """Train a sparse model to compute what a dense one does.

    In training the model's loss dict gains ``loss_distill_logits`` (of a segmentor's pixels) or
    ``loss_distill_rpn`` and ``loss_distill_roi`` (of the anchors, and of the regions that the
    detector sampled), and ``loss_distill_NAME`` for the maps of each module in ``features``, with
    underscores for dots. They are weighted and are means over images, so they pass through AMP,
    gradient accumulation and distributed training like every other loss.

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
        features: Weight, >= 0, of the mean squared error of the maps of modules by name, such as
            'backbone', 'neck', 'decode_head.bottleneck' or 'roi_head.bbox_roi_extractor'. Defaults
            to None, dict(backbone=0.5).

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
        features: Mapping[str, float] | None = None,
    ) -> None:
        if teacher != 'self' and (
            not isinstance(teacher, Mapping) or set(teacher) != {'config', 'checkpoint'}
        ):
            raise ValueError(
                f"teacher must be 'self' or dict(config=..., checkpoint=...), got {teacher!r}"
            )
        features = dict(backbone=0.5) if features is None else dict(features)
        weights = {f'features[{name!r}]': weight for name, weight in features.items()}
        for name, weight in {'logit_weight': logit_weight, **weights}.items():
            if not weight >= 0:
                raise ValueError(f'{name} must be at least 0, got {weight!r}')
        if not any((logit_weight, *features.values())):
            raise ValueError(
                'logit_weight or a weight in features must be above 0, got '
                f'{logit_weight!r} and {features}; leave DistillationHook out to train '
                'without a teacher'
            )
        if not temperature > 0:
            raise ValueError(f'temperature must be above 0, got {temperature!r}')
        self.teacher = teacher
        self.features = {name: weight for name, weight in features.items() if weight}
        self.logit_weight = logit_weight
        self.temperature = temperature
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
        heads = logit_heads(student) if self.logit_weight else []
        for name in self.features:
            ops.find_module(student, name)
        names = {*heads, *self.features}
        teacher, classes = self._make_teacher(runner, sorted(names))
        for name in (*heads, *self.features):
            ops.find_module(teacher, name)
        ours = getattr(runner.train_dataloader.dataset, 'metainfo', {}).get('classes')
        check_teacher(student, teacher, heads, (ours, classes))
        self._student, self._teacher = student, teacher.requires_grad_(False)
        self._teacher.eval()  # mmseg's VisionTransformer does not return itself
        self._heads = heads
        in_roi_head = any(name.startswith(ROI_PARTS) for name in names)
        self._needs_rois = in_roi_head and ops.is_two_stage(student)
        names |= {ops.ROI_INPUT, ops.ROI} if self._needs_rois else set()
        self._names = sorted(names)
        self._taps = [ops.Taps(model, self._names) for model in (student, teacher)]
        # Parts of a sharded model do not run on their own: the first batch compares those.
        if not isinstance(runner.model, FullyShardedDataParallel):
            self._probe(student)
        self._handles = [
            student.register_forward_pre_hook(self._start, with_kwargs=True),
            student.register_forward_hook(self._add_losses, with_kwargs=True),
        ]
        source = self.teacher if self.teacher == 'self' else self.teacher['checkpoint']
        weights = {LOSS_NAMES[head]: self.logit_weight for head in heads} | self.features
        print_log(
            f'Distillation from {source}: '
            + ', '.join(f'{loss_name(name)} {weight}' for name, weight in weights.items())
            + f', temperature {self.temperature}',
            logger='current',
        )

    def after_train(self, runner: Runner) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        for taps in self._taps:
            taps.close()
        self._student = self._teacher = None

    def _make_teacher(
        self, runner: Runner, names: Sequence[str]
    ) -> tuple[nn.Module, Sequence[str] | None]:
        if self.teacher == 'self':
            return copy_student(runner, names, self._loaded), None
        return load_teacher(**self.teacher)

    def _probe(self, student: nn.Module) -> None:
        """Run both models on an empty image, so that what does not fit fails now."""
        mean = getattr(student.data_preprocessor, 'mean', None)
        channels = 3 if mean is None else len(mean)
        image = next(student.parameters()).new_zeros(1, channels, PROBE, PROBE)
        rois = image.new_tensor([[0, 0, 0, PROBE / 2, PROBE / 2]]) if self._needs_rois else None
        training = student.training
        student.eval()
        self._taps[0].recording = True
        with torch.no_grad():
            ops.run_parts(student, image, self._names, rois)
            self._losses(self._taps[0].pop(), image, ())
        student.train(training)

    def _start(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        self._taps[0].pop()  # what a forward that failed has left
        self._taps[0].recording = kwargs.get('mode') == 'loss'

    def _add_losses(
        self, model: nn.Module, args: tuple, kwargs: dict, losses: dict
    ) -> dict[str, Tensor] | None:
        if kwargs.get('mode') != 'loss':
            return None
        images = kwargs['inputs'] if 'inputs' in kwargs else args[0]
        samples = kwargs.get('data_samples') or ()
        return losses | self._losses(self._taps[0].pop(), images, samples)

    def _losses(
        self, calls: Sequence[ops.Call], images: Tensor, samples: Sequence
    ) -> dict[str, Tensor]:
        """Losses for what the student's taps recorded of a batch."""
        rois = None
        if self._needs_rois:
            calls, rois = ops.second_stage(calls)
        outs = [defaultdict(list), defaultdict(list)]
        for of_model, model_calls in zip(
            outs, (calls, self._run_teacher(images, rois)), strict=True
        ):
            for call in model_calls:
                of_model[call.name].append(call.out)
        losses = {}
        for head in self._heads:
            last = [of_model[head][-1] for of_model in outs]
            value = self._logit_loss(head, *last, images, samples, rois)
            losses[loss_name(LOSS_NAMES[head])] = self.logit_weight * value
        for name, weight in self.features.items():
            maps = [of_model[name] for of_model in outs]
            if not all(maps):
                raise ValueError(
                    'features must name modules that run up to the logits (backbone, neck, '
                    f"decode_head or rpn_head and roi_head.bbox_head), got '{name}'"
                )
            regions = rois if name.startswith(ROI_PARTS) else None
            value = ops.feature_loss(name, *maps, images, samples, regions)
            losses[loss_name(name)] = weight * value
        return losses

    def _run_teacher(self, images: Tensor, rois: Tensor | None) -> list[ops.Call]:
        """Return what the teacher's taps record of a batch."""
        weight = next(self._teacher.parameters())
        if weight.device != images.device:
            # Not of the student's parameters, which sharding may keep elsewhere.
            self._teacher.to(images.device)
        if not torch.is_autocast_enabled(images.device.type):
            # The mixed precision of a sharded student has cast its inputs.
            images = images.to(weight.dtype)
            rois = None if rois is None else rois.to(weight.dtype)
        self._taps[1].recording = True
        with torch.no_grad():
            ops.run_parts(self._teacher, images, self._names, rois)
        return self._taps[1].pop()

    def _logit_loss(
        self,
        head: str,
        student: object,
        teacher: object,
        images: Tensor,
        samples: Sequence,
        rois: Tensor | None,
    ) -> Tensor:
        module = self._student.get_submodule(head)
        if head == ops.SEGMENTOR:
            if not isinstance(student, Tensor):
                raise ValueError(
                    'logit_weight needs a decode_head that returns one map of logits in training '
                    f'(set it to 0 elsewhere), got a {type(student).__name__} '
                    f'of {type(module).__name__}'
                )
            losses = module.loss_decode
            losses = losses if isinstance(losses, nn.ModuleList) else [losses]
            sigmoid = any(getattr(loss, 'use_sigmoid', False) for loss in losses)
            kl_BHW = self._kl(head, student, teacher, sigmoid)
            if samples:
                weights = ops.label_mask(samples, kl_BHW.shape[-2:], module.ignore_index)
            else:
                weights = torch.ones_like(kl_BHW)
            return ops.mean_over_images(kl_BHW, weights)
        sigmoid = bool(getattr(module.loss_cls, 'use_sigmoid', False))
        if head == ops.ROI:
            kl_R = self._kl(head, student[0], teacher[0], sigmoid)
            return ops.mean_over_rois(kl_R, rois[:, 0].long(), len(images))
        levels = []
        classes = module.cls_out_channels
        for s, t in zip(student[0], teacher[0], strict=True):
            # The channels are those of each anchor in turn.
            s_BCAHW, t_BCAHW = (x.unflatten(1, (-1, classes)).transpose(1, 2) for x in (s, t))
            kl_BHW = self._kl(head, s_BCAHW, t_BCAHW, sigmoid).mean(1)
            inside = ops.content_mask(samples, s.shape, tuple(images.shape[-2:]), s.device)
            levels.append((kl_BHW, inside))
        # Every anchor counts alike, whatever its level.
        kl, inside = (torch.cat([x.flatten(1) for x in xs], 1) for xs in zip(*levels, strict=True))
        return ops.mean_over_images(kl, inside)

    def _kl(self, head: str, student: Tensor, teacher: Tensor, sigmoid: bool) -> Tensor:
        if student.shape != teacher.shape:
            raise ValueError(
                f'teacher must have logits of the same width and stride in {head}, '
                f'{tuple(student.shape)}, got {tuple(teacher.shape)}'
            )
        return ops.kl_divergence(student, teacher, self.temperature, sigmoid)


def loss_name(name: str) -> str:
    """Return the name of a loss in the log."""
    return f'loss_distill_{name.replace(".", "_")}'


def logit_heads(model: nn.Module) -> list[str]:
    """Return the names of the heads whose logits can be compared.

    Raises:
        ValueError: If the model is neither a segmentor with one head for the pixels nor a detector
            of two stages with one head for the boxes.
    """
    if ops.is_single(model, ops.SEGMENTOR) and not ops.has_queries(model.decode_head):
        return [ops.SEGMENTOR]
    if ops.is_single(model, ops.RPN) and ops.is_two_stage(model):
        return [ops.RPN, ops.ROI]
    raise ValueError(
        'logit_weight needs a segmentor with one decode_head that returns a map of logits, or a '
        'detector with an rpn_head and one roi_head.bbox_head (set it to 0 elsewhere), '
        f'got {type(model).__name__}'
    )
