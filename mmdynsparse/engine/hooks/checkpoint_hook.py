"""Checkpoints that a crash, a full disk or a NaN does not spoil."""

import logging
import math
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import Tensor

from ...registry import HOOKS
from ...utils.checkpoints import PARTIAL, WHOLE_FILES


class LateRemoval(LocalBackend):
    """Local files whose removal waits until ``finish`` is called."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []

    def remove(self, filepath: str) -> None:
        """Note a file for removal."""
        self.waiting.append(filepath)

    def finish(self, kept: Collection[str | None]) -> None:
        """Remove the noted files, but not those that were written since."""
        for path in self.waiting:
            if path not in kept:
                Path(path).unlink(missing_ok=True)
        self.waiting = []


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook``, but what is on the disk stays whole.

    - A checkpoint appears under its name when it is complete.
    - An older one is removed after its successor is written, so the disk needs room for one more
      than ``max_keep_ckpts``.
    - A model with NaN or infinite values is not written: training ends with an error. A loss that
      is NaN or infinite is looked into at once; where the loss scale of mixed precision has kept it
      from the weights, it is only a warning.

    ``tools/train.py`` uses it in place of ``CheckpointHook``. Arguments are the same. The first
    two points hold for local files.

    Raises:
        FloatingPointError: While training, if the model is no longer finite.
    """

    def before_train(self, runner: Runner) -> None:
        """Prepare the folder."""
        super().before_train(runner)
        self._not_finite = not_finite(runner.model.state_dict())
        whole = dict(backend=WHOLE_FILES)
        local = isinstance(self.file_backend, LocalBackend)
        if not local or self.backend_args not in (None, whole):
            return
        self.backend_args, self.file_backend = whole, LateRemoval()
        if is_main_process():
            for path in Path(self.out_dir).glob(f'*.pth{PARTIAL}'):
                path.unlink()

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: object = None,
        outputs: Mapping | None = None,
    ) -> None:
        """Look at the loss, then do what the original does."""
        loss = torch.as_tensor((outputs or {}).get('loss', 0.0)).item()
        if not math.isfinite(loss):
            self._check_finite(runner.model.state_dict(), runner)
            print_log(
                f'loss is {loss} in iteration {runner.iter + 1}. The weights are still '
                'finite: the step was left out. Look for such values in the data if it is not '
                'one of the first iterations.',
                logger='current',
                level=logging.WARNING,
            )
        super().after_train_iter(runner, batch_idx, data_batch, outputs)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Refuse weights that are not finite."""
        self._check_finite(checkpoint['state_dict'], runner)

    def _save_checkpoint(self, runner: Runner) -> None:
        super()._save_checkpoint(runner)
        self._finish()

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        super()._save_best_checkpoint(runner, metrics)
        self._finish()

    def _finish(self) -> None:
        if isinstance(self.file_backend, LateRemoval):
            best = getattr(self, 'best_ckpt_path_dict', {}).values()
            kept = {self.last_ckpt, getattr(self, 'best_ckpt_path', None), *best}
            self.file_backend.finish(kept)

    def _check_finite(self, state_dict: Mapping[str, Tensor], runner: Runner) -> None:
        # A mask may hold infinite values from the start.
        bad = [name for name in not_finite(state_dict) if name not in self._not_finite]
        if bad:
            raise FloatingPointError(
                f'the model must be finite, got NaN or infinite values in {len(bad)} tensors '
                f'(first {bad[0]!r}) in iteration {runner.iter + 1}, so it is not saved. Look for '
                'such values in the data, or lower the learning rate, and continue from the last '
                'checkpoint with --resume'
            )


def not_finite(state_dict: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors with NaN or infinite values, without a wrapper's prefix."""
    bad = [name for name, x in state_dict.items() if not torch.isfinite(x).all()]
    return [name.removeprefix('module.') for name in bad]
