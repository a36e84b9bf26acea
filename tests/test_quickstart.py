import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

from mmdynsparse.datasets import CLASSES, PALETTE, THING_CLASSES

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / 'configs/quickstart'


@pytest.fixture(scope='module')
def quickstart():
    spec = importlib.util.spec_from_file_location('quickstart', ROOT / 'tools/quickstart.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ('method', 'classes'), [('upernet', CLASSES), ('mask-rcnn', THING_CLASSES)]
)
def test_configs_fit_the_dataset_and_each_other(method, classes):
    dense = Config.fromfile(CONFIGS / f'swin-xt_{method}_quickstart.py')
    sparse = Config.fromfile(CONFIGS / f'sparse-swin-xt_{method}_quickstart.py')
    for dataloader in (dense.train_dataloader, dense.val_dataloader):
        assert tuple(dataloader.dataset.metainfo.classes) == classes
        palette = [tuple(colour) for colour in dataloader.dataset.metainfo.palette]
        assert palette == [PALETTE[CLASSES.index(name)] for name in classes]

    assert [hook.type for hook in sparse.custom_hooks] == ['mmdynsparse.SparsityHook']
    dense, sparse = dense.to_dict(), sparse.to_dict()
    backbone = sparse['model']['backbone']
    assert backbone.pop('type') == 'mmdynsparse.SparseSwinTransformer'
    assert backbone.pop('sparsity')['keep_ratio'] == 0.7
    assert dense['model']['backbone'].pop('type') == 'SwinTransformer'
    del sparse['custom_hooks']
    assert sparse == dense


def test_progress_lines(quickstart):
    prefix = '11/20 11:22:27 - mmengine - INFO - '
    train = (
        'Iter(train) [ 20/300]  base_lr: 1.0000e-03 lr: 1.0000e-03  eta: 0:01:56  time: 0.4173  '
        'loss: 1.9648  decode.loss_ce: 1.9548  loss_keep_ratio: 0.01  keep_rate_0: 0.7012  '
        'keep_rate_1: 0.5049'
    )
    assert quickstart.describe(prefix + train) == (
        'train    20/300  loss 1.965  keep rates 0.70 0.50  0:01:56 left'
    )
    assert quickstart.describe(prefix + 'Iter(test) [ 20/40]    eta: 0:00:01') == 'evaluate 20/40'
    assert quickstart.describe(prefix + 'Saving checkpoint at 300 iterations') == ''


def test_a_failing_step_stops_with_its_message(quickstart, tmp_path):
    with pytest.raises(SystemExit) as error:
        quickstart.run(['train.py', tmp_path / 'missing.py'], tmp_path / 'log.txt')
    assert 'missing.py' in str(error.value)
    assert 'train.py failed' in str(error.value)


def test_slower_is_called_slower(quickstart, monkeypatch):
    latency = quickstart.compare_latency({'x': int}, rounds=1)['x']
    medians = {'dense': 10.0, 'sparse': 12.5}
    monkeypatch.setattr(quickstart, 'count_macs', lambda call, batch: 10**9)
    monkeypatch.setattr(
        quickstart,
        'compare_latency',
        lambda calls, rounds: {key: latency._replace(median=medians[key[1]]) for key in calls},
    )
    rows = quickstart.cost_rows(dict.fromkeys(medians), [{}])
    assert [row.remark for row in rows][2:] == ['0.80 x, slower'] * 2


@pytest.mark.slow
@pytest.mark.parametrize(('task', 'metric'), [('seg', 'mIoU (%)'), ('det', 'box AP')])
def test_quickstart(task, metric, tmp_path):
    command = [sys.executable, str(ROOT / 'tools/quickstart.py'), task, '--iters', '3']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    work_dir = tmp_path / f'work_dirs/quickstart-{task}'
    rows = {row['name']: row for row in json.loads((work_dir / 'table.json').read_text())['rows']}
    assert 0 <= rows[metric]['sparse'] <= 100
    targets = dict(zip((1, 2, 3), (0.7, 0.5, 0.3), strict=True))
    for block, target in targets.items():
        rate = rows[f'keep rate stage 2 block {block}']['sparse']
        assert rate == pytest.approx(target, abs=0.01)
    assert rows['GMACs backbone']['sparse'] < rows['GMACs backbone']['dense']
    assert rows['latency model (ms)']['sparse'] > rows['latency backbone (ms)']['sparse'] > 0
    assert (work_dir / 'table.md').read_text().count('\n|') >= len(rows)
    assert (work_dir / 'sparse/iter_3.pth').exists()
    picture = np.asarray(Image.open(work_dir / 'keep_maps.png'))
    assert picture.shape[0] > 4 * 224
    assert picture.shape[1] > 4 * 320
