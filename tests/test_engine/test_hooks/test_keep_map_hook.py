"""Keep maps of validation images in the backends of mmengine's visualizer."""

from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.visualization import Visualizer
from mmseg.models import EncoderDecoder

from mmdynsparse.analysis.images import image_batch
from mmdynsparse.engine import KeepMapHook
from mmdynsparse.visualization import keep_map_row

BACKENDS = [dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]
NAME = 'val_keep_maps_1'


def build(sparsity: dict | None, mode: str = 'whole') -> EncoderDecoder:
    torch.manual_seed(0)
    return EncoderDecoder(
        backbone=dict(
            type='mmdynsparse.SparseSwinTransformer',
            embed_dims=12,
            depths=(1, 1, 2, 1),
            num_heads=(1, 2, 4, 8),
            sparsity=sparsity,
        ),
        decode_head=dict(
            type='mmseg.FCNHead', in_channels=96, in_index=3, channels=8, num_classes=2
        ),
        data_preprocessor=dict(type='mmseg.SegDataPreProcessor', size=(64, 64)),
        test_cfg=ConfigDict(mode=mode, crop_size=(32, 32), stride=(32, 32)),
    ).eval()


@pytest.fixture
def visualizer(tmp_path):
    return Visualizer(vis_backends=BACKENDS, save_dir=str(tmp_path))


def test_pictures_reach_files_and_tensorboard(visualizer, tmp_path):
    events = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    model = build(dict(keep_ratio=0.5, locations={2: (1,)}))
    runner = SimpleNamespace(model=model, visualizer=visualizer, iter=7)
    hook = KeepMapHook(interval=2, scale=0.5)
    hook.before_run(runner)
    batches = [image_batch(2, (64, 64), 'mmseg', seed=seed) for seed in range(2)]
    for i, batch in enumerate(batches):
        hook.after_train_iter(runner, i, batch, {})
        hook.after_val_iter(runner, i, batch, model.test_step(batch))
    expected = keep_map_row(model, batches[1], 0.5)

    (path,) = tmp_path.rglob('*.png')  # of the second batch alone
    assert path.name == f'{NAME}_7.png'
    np.testing.assert_array_equal(cv2.imread(str(path))[..., ::-1], expected)
    visualizer.close()
    (folder,) = {path.parent for path in tmp_path.rglob('events.*')}
    log = events.EventAccumulator(str(folder), size_guidance=dict(images=0))
    log.Reload()
    (image,) = log.Images(NAME)
    assert (image.step, image.height, image.width) == (7, *expected.shape[:2])


def test_bad_arguments_and_models_are_refused_before_the_first_iteration():
    for wrong in (0, 0.5, -1):
        with pytest.raises(ValueError, match=f'interval must be an integer from 1 on, got {wrong}'):
            KeepMapHook(interval=wrong)
    with pytest.raises(ValueError, match='scale must be above 0, got 0'):
        KeepMapHook(scale=0)
    with pytest.raises(ValueError, match='need a sparse part, got a EncoderDecoder'):
        KeepMapHook().before_run(SimpleNamespace(model=build(None)))
    with pytest.raises(ValueError, match=r"mode must be 'whole' for keep maps.*got 'slide'"):
        KeepMapHook().before_run(SimpleNamespace(model=build(dict(keep_ratio=0.5), 'slide')))
