import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

from mmdynsparse.datasets import CLASSES, PALETTE, THING_CLASSES, write_scenes

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
def test_configs_fit_the_dataset(method, classes):
    cfg = Config.fromfile(CONFIGS / f'swin-xt_{method}_quickstart.py')
    for dataloader in (cfg.train_dataloader, cfg.test_dataloader):
        assert tuple(dataloader.dataset.metainfo.classes) == classes
        palette = [tuple(colour) for colour in dataloader.dataset.metainfo.palette]
        assert palette == [PALETTE[CLASSES.index(name)] for name in classes]


def test_the_control_trains_as_the_sparse_model(quickstart, tmp_path):
    config = tmp_path / 'sparse.py'
    config.write_text(
        "model = dict(type='EncoderDecoder', backbone=dict(sparsity=dict(keep_ratio=0.7)), "
        'decode_head=dict(sparsity=dict(keep_ratio=0.3)), auxiliary_head=dict(channels=8))'
    )
    options = quickstart.control_options(config)
    assert [o for o in options if o.startswith('model.')] == [
        'model.backbone.sparsity=None',
        'model.decode_head.sparsity=None',
    ]
    lr = Config.fromfile(CONFIGS / '_base_/runtime.py').optim_wrapper.optimizer.lr
    assert f'optim_wrapper.optimizer.lr={lr / 5}' in options


def test_progress_lines(quickstart, capsys):
    prefix = '11/20 11:22:27 - mmengine - INFO - '
    train = prefix + (
        'Iter(train) [ 20/300]  base_lr: 1.0000e-03 lr: 1.0000e-03  eta: 0:01:56  time: 0.4173  '
        'loss: 1.9648  decode.loss_ce: 1.9548  loss_keep_ratio: 0.01  keep_rate_0: 0.7012\n'
    )
    assert quickstart.describe(train) == ('train, loss 1.96', 20, 300)
    test = prefix + 'Iter(test) [ 20/40]    eta: 0:00:01'
    assert quickstart.describe(test) == ('evaluate', 20, 40)
    saving = prefix + 'Saving checkpoint at 300 iterations'
    assert quickstart.describe(saving) is None
    log = io.StringIO()
    quickstart.show_progress([train, saving], log)
    assert log.getvalue() == train + saving
    assert 'train, loss 1.96 20/300' in capsys.readouterr().out


def test_a_failing_step_stops_with_its_message(quickstart, tmp_path):
    with pytest.raises(SystemExit) as error:
        quickstart.run(['train.py', tmp_path / 'missing.py'], tmp_path)
    assert 'missing.py' in str(error.value)
    assert f'train.py failed, all its output is in {tmp_path / "log.txt"}' in str(error.value)


def test_slower_is_called_slower(quickstart):
    rows = [
        dict(part=part, gmacs=gmacs, median=median)
        for part in ('backbone', 'whole')
        for gmacs, median in ((2.0, 10.0), (1.0, 12.5))
    ]
    remarks = [row.remark for row in quickstart.cost_rows(dict(rows=rows))]
    assert remarks == ['2.00 x'] * 2 + ['0.80 x, slower'] * 2


def test_a_difference_beyond_the_noise_is_not_called_equal(quickstart):
    metrics = dict(dense=dict(mIoU=70.0), sparse=dict(mIoU=68.0))
    for error, words in ((1.5, 'equal within the noise, 3.000'), (0.5, 'differs by more than the')):
        (row,) = quickstart.accuracy_rows(metrics, {'mIoU (%)': 'mIoU'}, {'mIoU (%)': error})
        assert words in row.remark


@pytest.fixture
def scenes(quickstart, tmp_path, monkeypatch):
    """Eight scenes whose predictions of both models are the truth."""
    monkeypatch.chdir(tmp_path)
    write_scenes(quickstart.DATA, 1, quickstart.PARTS, (64, 64))
    truth = json.loads((quickstart.DATA / 'annotations/instances_val.json').read_text())
    found = [dict(a, score=1.0, segmentation=dict(a['segmentation'])) for a in truth['annotations']]
    for name in ('sparse', 'dense'):
        folder = tmp_path / f'test-{name}/predictions'
        folder.mkdir(parents=True)
        for path in (quickstart.DATA / 'annotations/val').glob('*.png'):
            (folder / path.name).write_bytes(path.read_bytes())
        for kind in ('bbox', 'segm'):
            (folder / f'coco.{kind}.json').write_text(json.dumps(found))
    return tmp_path


def test_noise_of_a_difference(quickstart, scenes):
    assert quickstart.standard_errors('seg', scenes) == {'mIoU (%)': 0.0}
    assert quickstart.standard_errors('det', scenes) == {'box AP': 0.0, 'mask AP': 0.0}
    path = scenes / 'test-dense/predictions/0003.png'
    right = np.asarray(Image.open(path))
    Image.fromarray(np.full_like(right, 4)).save(path)
    dense = quickstart.parts_miou(scenes / 'test-dense')[0]
    assert [i for i, score in enumerate(dense) if score < 99.9] == [3]
    # Of eight differences, all but one zero: the standard error is an eighth of that one.
    expected = pytest.approx((100 - dense[3]) / 8)
    assert quickstart.standard_errors('seg', scenes)['mIoU (%)'] == expected


@pytest.mark.slow
@pytest.mark.parametrize(('task', 'metric'), [('seg', 'mIoU (%)'), ('det', 'box AP')])
def test_quickstart(task, metric, tmp_path):
    command = [sys.executable, str(ROOT / 'tools/quickstart.py'), task, '--iters', '10']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    for tool in ('train.py', 'sparsify.py', 'test.py', 'benchmark.py', 'demo.py'):
        assert tool in done.stdout
    work_dir = tmp_path / f'work_dirs/quickstart-{task}'
    rows = {row['name']: row for row in json.loads((work_dir / 'table.json').read_text())['rows']}
    assert 0 <= rows[metric]['sparse'] <= 100
    if task == 'seg':  # nothing of the detector is trained
        for i, target in enumerate((0.7, 0.5, 0.3)):
            assert rows[f'keep rate {i}']['sparse'] == pytest.approx(target, abs=0.01)
        assert (work_dir / 'sparse/iter_4.pth').exists()
    assert rows['GMACs whole']['sparse'] < rows['GMACs whole']['dense']
    assert rows['latency (ms) whole']['sparse'] > rows['latency (ms) backbone']['sparse'] > 0
    assert (work_dir / 'table.md').read_text().count('\n|') >= len(rows)
    pictures = sorted((work_dir / 'pictures').glob('*.png'))
    assert len(pictures) == 4
    panels = 6 if task == 'seg' else 2  # prediction, input, and four keep maps
    assert np.asarray(Image.open(pictures[0])).shape[1] > panels * 500
