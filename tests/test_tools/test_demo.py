"""tools/demo.py, and the libraries' own inferencers with sparse models."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

from mmdynsparse.visualization.keep_maps import GAP, LABEL_HEIGHT

TOOL = 'demo.py'
SIDE = 64
APIS = {
    'seg': 'from mmseg.apis import MMSegInferencer as Inferencer, init_model, inference_model',
    'det': 'from mmdet.apis import DetInferencer as Inferencer, init_detector as init_model, '
    'inference_detector as inference_model',
}
# Nothing of ours is imported: the scope of the types in the config does it.
SCRIPT = """
import sys
{api}
config, checkpoint, image = sys.argv[1:]
arguments = dict(model=config, weights=checkpoint, device='cpu')
Inferencer(**arguments)(image, return_datasamples=True)
model = init_model(config, checkpoint, device='cpu')
inference_model(model, image)
print(type(model.backbone).__name__, len(model.backbone.decisions))
"""


@pytest.fixture
def run(write_config: Callable, data_root: Path, tmp_path: Path) -> Callable:
    """Returns config, a checkpoint with random weights, and an image for 'seg' or 'det'."""

    def prepare(task: str) -> tuple[str, str, str]:
        # mmseg's inference_model reads this name.
        extra = "test_pipeline = val_dataloader['dataset']['pipeline']\n"
        config = write_config(task, extra, name='demo')
        cfg = Config.fromfile(config)
        init_default_scope(cfg.default_scope)
        meta = cfg.test_dataloader.dataset.metainfo.to_dict()
        checkpoint = dict(
            state_dict=MODELS.build(cfg.model).state_dict(), meta=dict(dataset_meta=meta)
        )
        torch.save(checkpoint, tmp_path / 'model.pth')
        image = data_root / 'images' / 'val' / '0.jpg'
        return str(config), str(tmp_path / 'model.pth'), str(image)

    return prepare


@pytest.mark.parametrize('task', ['seg', 'det'])
def test_prediction_and_keep_maps(
    task: str, run: Callable, load_tool: Callable, tmp_path: Path
) -> None:
    config, checkpoint, image = run(task)
    args = [image, config, checkpoint, '--out', str(tmp_path / 'plain')]
    load_tool(TOOL).main(args)
    prediction = np.asarray(Image.open(tmp_path / 'plain' / '0.png'))
    assert prediction.shape == (SIDE, SIDE, 3)
    args[-1] = str(tmp_path / 'maps')
    load_tool(TOOL).main([*args, '--keep-maps'])
    picture = np.asarray(Image.open(tmp_path / 'maps' / '0.png'))
    # Prediction, input and the backbone's one decision.
    assert picture.shape == (SIDE + LABEL_HEIGHT, 3 * SIDE + 2 * GAP, 3)
    shown, _, kept = (picture[LABEL_HEIGHT:, i * (SIDE + GAP) :][:, :SIDE] for i in range(3))
    np.testing.assert_array_equal(shown, prediction)
    assert (kept[..., 2].astype(int) > kept[..., 0].astype(int) + 40).any()


def test_several_images(
    run: Callable, load_tool: Callable, data_root: Path, tmp_path: Path
) -> None:
    config, checkpoint, _ = run('seg')
    images = sorted(map(str, (data_root / 'images' / 'val').glob('*.jpg')))
    load_tool(TOOL).main([*images, config, checkpoint, '--out', str(tmp_path), '--budget', '1.0'])
    assert all((tmp_path / f'{Path(image).stem}.png').is_file() for image in images)


def test_bad_input(run: Callable, fails: Callable, tmp_path: Path) -> None:
    config, checkpoint, image = run('seg')
    out = ('--out', tmp_path)
    no_image = tmp_path / 'text.jpg'
    no_image.write_text('no image')
    assert f'images, got {str(no_image)!r}' in fails(TOOL, no_image, config, checkpoint, *out)
    assert 'files of images' in fails(TOOL, tmp_path / 'none.png', config, checkpoint, *out)
    assert 'written twice' in fails(TOOL, image, image, config, checkpoint, *out)
    (tmp_path / '0.png').write_text('mine')
    assert '0.png is there' in fails(TOOL, image, config, checkpoint, *out)
    assert (tmp_path / '0.png').read_text() == 'mine'
    out = ('--out', tmp_path / 'new')
    assert 'existing checkpoint' in fails(TOOL, image, config, tmp_path / 'none.pth', *out)
    line = fails(TOOL, image, config, checkpoint, *out, '--budget', '0.6')
    assert 'budget must be 1.0 or one that the model has' in line


@pytest.mark.parametrize('task', ['seg', 'det'])
def test_inferencers_need_no_import_of_ours(task: str, run: Callable, tmp_path: Path) -> None:
    script = SCRIPT.format(api=APIS[task])
    root = Path(__file__).parents[2]
    env = {**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        [sys.executable, '-c', script, *run(task)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == 'SparseSwinTransformer 1'
