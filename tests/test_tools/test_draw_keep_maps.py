"""tools/analysis_tools/draw_keep_maps.py on tiny models."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

from mmdynsparse.analysis import dense_config
from mmdynsparse.visualization.keep_maps import GAP, LABEL_HEIGHT

TOOL = 'analysis_tools/draw_keep_maps.py'
SIDE = 64
SPARSE_HEAD = """
model['decode_head'].update(
    type='mmdynsparse.SparseUPerHead',
    norm_cfg=dict(type='BN'),
    sparsity=dict(keep_ratio=0.5, predictor=dict(type='mmdynsparse.CellPredictor')),
)
"""


@pytest.mark.parametrize('task', ['seg', 'det'])
def test_one_row_for_each_image_one_panel_for_each_decision(
    task: str, load_tool: Callable, write_config: Callable, tmp_path: Path
) -> None:
    config = write_config(task)
    load_tool(TOOL).main([str(config), '--out', str(tmp_path), '--num-images', '2'])
    picture = np.asarray(Image.open(tmp_path / 'keep_maps.png'))
    locations = Config.fromfile(config).model.backbone.sparsity.locations
    count = sum(map(len, locations.values()))
    width = (count + 1) * SIDE + count * GAP
    assert picture.shape[:2] == (2 * (SIDE + LABEL_HEIGHT), width)
    rows = picture.reshape(2, SIDE + LABEL_HEIGHT, width, 3)[:, LABEL_HEIGHT:]
    image, *panels = (rows[:, :, i * (SIDE + GAP) :][:, :, :SIDE] for i in range(count + 1))
    for panel in panels:
        share = (panel == image).all(-1).mean()
        assert 0 < share < 1


@pytest.mark.parametrize('extra', ['', SPARSE_HEAD], ids=['backbone', 'head'])
def test_a_dense_checkpoint_leaves_the_predictors_random(
    extra: str,
    load_tool: Callable,
    write_config: Callable,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    config = write_config('seg', extra)
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    dense = MODELS.build(dense_config(cfg.model).model)
    torch.save(dense.state_dict(), tmp_path / 'dense.pth')
    load_tool(TOOL).main([str(config), str(tmp_path / 'dense.pth'), '--out', str(tmp_path)])
    assert 'the predictors are random' in capsys.readouterr().out
    assert (tmp_path / 'keep_maps.png').is_file()


def test_bad_input(fails: Callable, write_config: Callable) -> None:
    config = write_config('seg')
    dense = write_config('seg', "\nmodel['backbone']['sparsity'] = None", name='dense')
    assert 'sparse part' in fails(TOOL, dense)
    assert '--scale must be in (0, 4], got 0.0' in fails(TOOL, config, '--scale', '0')
    assert '--images must be existing' in fails(TOOL, config, '--images', 'nowhere.jpg')
