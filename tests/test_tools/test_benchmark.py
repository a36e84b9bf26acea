"""tools/analysis_tools/benchmark.py on tiny models."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

from mmdynsparse.analysis import benchmark as library
from mmdynsparse.analysis import dense_config

TOOL = 'analysis_tools/benchmark.py'


@pytest.fixture
def run(load_tool: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable:
    """Runs the tool in this process and returns what it wrote and printed."""

    def call(*args: object) -> tuple[dict, str]:
        options = ('--rounds', 2, '--warmup', 0, '--out', tmp_path / 'new' / 'out')
        # Its handlers would write to the streams of an earlier test.
        MMLogger._instance_dict.clear()
        load_tool(TOOL).main([str(arg) for arg in (*args, *options)])
        result = json.loads((tmp_path / 'new/out/benchmark.json').read_text())
        return result, capsys.readouterr().out

    return call


def test_segmentor(run: Callable, write_config: Callable, tmp_path: Path) -> None:
    args = ('--sizes', '64x96', '--batch-sizes', 1, 2, '--keep-ratios', '1.0', '0.5', '0.25')
    result, output = run(write_config('seg'), *args, '--parts', 'whole', 'backbone', 'neck', 'head')
    rows = result['rows']
    settings = [(row['batch'], row['part']) for row in rows[::4]]
    assert settings == [(b, part) for b in (1, 2) for part in ('backbone', 'head', 'whole')]
    assert [row['keep_ratios'] for row in rows] == [[], [1.0], [0.5], [0.25]] * len(settings)
    for i in range(0, len(rows), 4):
        dense = rows[i]
        assert dense['model'] == 'dense' and dense['speed_up'] == dense['ideal'] == 1
        for row in rows[i : i + 4]:
            assert row['size'] == '64x96'
            assert 0 < row['p10'] <= row['median'] <= row['p90']
            assert row['speed_up'] == pytest.approx(dense['median'] / row['median'])
            assert row['ideal'] == pytest.approx(dense['gmacs'] / row['gmacs'])
            assert row['peak_mib'] > 0
            assert ('breakdown' in row) == (row['part'] in ('backbone', 'whole'))
    for row in rows[:4]:
        times = dict(row['breakdown'])
        assert times.pop('whole') == pytest.approx(sum(times.values()))
        assert times['attention'] > 0 and times['slow path'] > 0 and times['rest'] > 0
        gathers = row['keep_ratios'] not in ([], [1.0])
        for part in ('predictor', 'selection', 'gather', 'scatter', 'fast path'):
            assert (times[part] > 0) == gathers, (part, row['keep_ratios'])
    for row in rows[8:12]:
        times = dict(row['breakdown'])
        assert list(times) == ['backbone', 'decode_head', 'rest', 'whole']
        assert times.pop('whole') == pytest.approx(sum(times.values())) and min(times.values()) > 0
    gmacs = [row['gmacs'] for row in rows[:4]]
    assert gmacs[0] >= gmacs[1] > gmacs[2] > gmacs[3]
    assert rows[2]['kept'] == pytest.approx([0.5])
    assert [row['kept'] for row in rows[4:8]] == [[]] * 4  # of the head
    setting = result['setting']
    assert setting['dense'] == 'mmseg.SwinTransformer' and setting['weights'] == 'random'
    for key in ('device', 'threads', 'torch', 'mmengine', 'mmcv', 'mmseg', 'dtype', 'mode', 'seed'):
        assert f'{key} ' in output and str(setting[key]) in output
    assert Image.open(tmp_path / 'new/out/latency.png').size[0] > 400


def test_detector_on_an_image_in_bfloat16(run: Callable, write_config: Callable, tmp_path) -> None:
    image = tmp_path / 'image.png'
    Image.fromarray(np.full((30, 50, 3), 80, np.uint8)).save(image)
    args = ('--parts', 'neck', 'backbone', '--sizes', 64, '--dtype', 'bf16', '--image', image)
    result, _ = run(write_config('det'), *args)
    assert [row['part'] for row in result['rows']] == ['backbone'] * 2 + ['neck'] * 2
    assert result['setting']['dense'] == 'mmdet.SwinTransformer'
    assert result['setting']['input'] == str(image)


def test_whole_detector(run: Callable, write_config: Callable) -> None:
    args = ('--parts', 'head', 'whole', '--sizes', 64)
    head, _, whole, _ = run(write_config('det'), *args)[0]['rows']
    assert 0 < head['gmacs'] < whole['gmacs']


def test_detections_are_stated_and_can_be_fixed(
    run: Callable, fails: Callable, write_config: Callable
) -> None:
    args = ('--parts', 'backbone', 'head', 'whole', '--sizes', 64)
    result, output = run(write_config('det'), *args, '--detections', 7)
    rows = result['rows']
    assert [row.get('detections') for row in rows] == [None] * 2 + [7] * 4
    assert result['setting']['detections'] == 7 and 'detections' in output
    for row in rows[4:]:
        times = dict(row['breakdown'])
        assert times['post-processing'] > 0
        assert times.pop('whole') == pytest.approx(sum(times.values()))
    found = run(write_config('det'), *args)[0]
    assert all('detections' in row for row in found['rows'][2:])
    assert found['setting']['detections'] == 'what the model finds, see the table'
    assert '--detections' in fails(TOOL, write_config('seg'), '--detections', 7)


def test_weights_of_a_checkpoint_reach_both_models(
    run: Callable, write_config: Callable, load_tool: Callable, tmp_path: Path, monkeypatch
) -> None:
    config = write_config('seg')
    pairs = []
    tool = load_tool(TOOL)

    def no_measurement(pair, plan):
        pairs.append(pair)
        return iter(())

    monkeypatch.setattr(tool, 'run_benchmark', no_measurement)
    tool.main([str(config)])
    weights = {k: torch.full_like(v, 2) for k, v in pairs[0].sparse.state_dict().items()}
    torch.save(dict(state_dict=weights), tmp_path / 'twos.pth')
    tool.main([str(config), str(tmp_path / 'twos.pth')])
    for model in pairs[1][:2]:
        assert all((tensor == 2).all() for tensor in model.state_dict().values())


@pytest.mark.parametrize('fault', [RuntimeError('out of memory'), KeyboardInterrupt()])
def test_measured_rows_are_written_when_a_later_setting_fails(
    fault: BaseException, fails: Callable, write_config: Callable, tmp_path: Path, monkeypatch
) -> None:
    def fail_at_128(batch, hw, *args):
        if hw == (128, 128):
            raise fault
        return image_batch(batch, hw, *args)

    image_batch = library.image_batch
    monkeypatch.setattr(library, 'image_batch', fail_at_128)
    args = ('--sizes', 64, 128, '--parts', 'backbone', '--rounds', 1, '--out', tmp_path)
    line = fails(TOOL, write_config('seg'), *args)
    assert f'stopped by {type(fault).__name__}' in line and 'measured before: 2 rows' in line
    result = json.loads((tmp_path / 'benchmark.json').read_text())
    assert [row['size'] for row in result['rows']] == ['64x64', '64x64']
    assert 'fail_at_128' in result['error']
    assert (tmp_path / 'latency.png').is_file()


@pytest.mark.parametrize(
    ('args', 'expected'),
    [
        (('--rounds', 0), "--rounds: must be at least 1, got '0'"),
        (('--warmup', -1), "--warmup: must be at least 0, got '-1'"),
        (('--batch-sizes', 1, 0), "--batch-sizes: must be at least 1, got '0'"),
        (('--dtype', 'int8'), "--dtype: invalid choice: 'int8'"),
        (('--sizes', '0x64'), "must be H or HxW in px, at least 1, got '0x64'"),
        (('--sizes', 64, '3x64'), 'at least one patch of the backbone, 4 px, got 3x64'),
        (('--keep-ratios', 'half'), "--keep-ratios: must be in (0, 1], got 'half'"),
        (('--keep-ratios', '1.5'), 'keep_ratio must be a number in (0, 1], got 1.5'),
        (('--keep-ratios', '0.5,0.3'), 'a list of 1 values, one for each decision, got 2'),
        (('--mode', 'cudagraph'), "--mode 'cudagraph' needs --device 'cuda', got 'cpu'"),
        (('--image', 'none.jpg'), "--image must be an existing file, got 'none.jpg'"),
        (('--parts', 'neck'), "--parts must name some of ('backbone', 'head', 'whole')"),
    ],
)
def test_bad_arguments(args: tuple, expected: str, fails: Callable, write_config: Callable) -> None:
    assert expected in fails(TOOL, write_config('seg'), *args)


@pytest.mark.parametrize('tool', [TOOL, 'analysis_tools/get_flops.py'])
def test_bad_models(tool: str, fails: Callable, write_config: Callable, tmp_path: Path) -> None:
    config = write_config('seg')
    assert 'config must be an existing file' in fails(tool, tmp_path / 'none.py')
    dense = "model['backbone']['type'] = 'SwinTransformer'\ndel model['backbone']['sparsity']\n"
    line = fails(tool, write_config('seg', dense, name='dense'))
    assert 'config must have a sparse part' in line
    assert 'got none among EncoderDecoder' in line and 'SwinTransformer' in line
    assert 'existing checkpoint' in fails(tool, config, tmp_path / 'none.pth')
    torch.save(dict(state_dict={'backbone.weight': torch.zeros(3)}), tmp_path / 'other.pth')
    line = fails(tool, config, tmp_path / 'other.pth')
    assert "checkpoint must fit the config's model" in line and 'missing keys' in line


@pytest.mark.parametrize('tool', [TOOL, 'analysis_tools/get_flops.py'])
def test_dense_checkpoint(
    tool: str, load_tool: Callable, write_config: Callable, tmp_path: Path, capsys
) -> None:
    """The predictors are random, and it says so."""
    config = write_config('seg')
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    torch.save(MODELS.build(dense_config(cfg.model).model).state_dict(), tmp_path / 'dense.pth')
    rounds = ('--rounds', '1', '--sizes', '64') if tool == TOOL else ('--size', '64')
    load_tool(tool).main([str(config), str(tmp_path / 'dense.pth'), *rounds])
    assert 'a dense checkpoint: the predictors are random' in capsys.readouterr().out


def test_processes_end_with_a_code(
    run_tool: Callable, write_config: Callable, tmp_path: Path
) -> None:
    args = (write_config('seg'), '--parts', 'backbone', '--sizes', 64, '--rounds', 1)
    output = run_tool(TOOL, *args, '--out', tmp_path)
    assert 'speed-up' in output and 'breakdown' in output
    assert json.loads((tmp_path / 'benchmark.json').read_text())['rows']
    output = run_tool(TOOL, *args, '--keep-ratios', '2', code=1)
    assert 'benchmark.py: error: ' in output and 'got 2.0' in output


@pytest.mark.skipif(torch.cuda.is_available(), reason='a GPU is present')
def test_cuda_without_cuda(fails: Callable, write_config: Callable) -> None:
    line = fails(TOOL, write_config('seg'), '--device', 'cuda')
    assert "--device must be 'cpu' on a machine without CUDA, got 'cuda'" in line


@pytest.mark.parametrize('sparse', [False, True])
def test_pruned_models(sparse: bool, run: Callable, write_config: Callable) -> None:
    """Beside the model before pruning; a keep ratio is that of the pruned model."""
    extra = """
model['backbone']['pruning'] = dict(
    mixers=[['conv1'], ['none'], ['msa', 'conv3'], ['msa']], hidden=[[20], [9], [192, 60], [100]])
"""
    extra += '' if sparse else "model['backbone']['sparsity'] = None\n"
    ratios = ('--keep-ratios', '1.0', '0.5') if sparse else ()
    args = ('--sizes', '64', '--batch-sizes', 1, '--parts', 'backbone', *ratios)
    result, _ = run(write_config('seg', extra, name=f'pruned-{sparse}'), *args)
    dense, *rows = result['rows']
    gmacs = [row['gmacs'] for row in (dense, *rows)]
    assert max(gmacs[1:]) < 0.9 * gmacs[0]
    assert [row['keep_ratios'] for row in rows] == ([[1.0], [0.5]] if sparse else [[]])
