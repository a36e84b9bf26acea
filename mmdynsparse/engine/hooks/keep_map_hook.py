"""Keep maps in the validation's pictures."""

from collections.abc import Sequence

from mmengine.hooks import Hook
from mmengine.runner import Runner

from ...registry import HOOKS
from ...visualization import check_drawable, keep_map_row
from ..runs import bare_model


@HOOKS.register_module()
class KeepMapHook(Hook):
    """Draw what the sparse parts of a model keep of validation and test images.

    The pictures go to the backends of the runner's visualizer: PNG files, TensorBoard, and
    whatever else the config names. The first image of every ``interval``-th batch is drawn.

    Args:
        interval: Batches from one picture to the next, at least 1. Defaults to 50.
        scale: Size of the panels to that of the network's input, above 0. Defaults to 1.0.

    Raises:
        ValueError: If an argument is outside its range, or, before the first iteration, the model
            is not sparse or tested in windows.
    """

    def __init__(self, interval: int = 50, scale: float = 1.0) -> None:
        if not isinstance(interval, int) or interval < 1:
            raise ValueError(f'interval must be an integer from 1 on, got {interval!r}')
        if not scale > 0:
            raise ValueError(f'scale must be above 0, got {scale!r}')
        self.interval = interval
        self.scale = scale

    def before_run(self, runner: Runner) -> None:
        """Check that there is something to draw."""
        check_drawable(bare_model(runner))

    def _after_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | None = None,
        outputs: Sequence | None = None,
        mode: str = 'train',
    ) -> None:
        """Draw the image that the model has just seen."""
        if mode == 'train' or not self.every_n_inner_iters(batch_idx, self.interval):
            return
        row = keep_map_row(bare_model(runner), data_batch, self.scale)
        name = f'{mode}_keep_maps_{batch_idx}'
        runner.visualizer.add_image(name, row, step=runner.iter)
