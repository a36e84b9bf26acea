"""Runs of the tools on recorded data and checkpoints."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_dense_checkpoint_keeps_its_score_at_ratio_one(recorded, tmp_path):
    """All 101 validation images, whole: the mIoU that stock mmseg gave the dense model."""
    options = [
        f'test_dataloader.dataset.data_root={recorded / "data" / "camvid"}',
        'model.backbone.sparsity.keep_ratio=1.0',
    ]
    config = 'configs/sparse_swin/sparse-swin-n_upernet_1xb8-2k_camvid-256x256.py'
    checkpoint = recorded / 'checkpoints' / 'upernet_swin-n_camvid_dense.pth'
    command = [sys.executable, 'tools/test.py', config, str(checkpoint), '--work-dir', tmp_path]
    subprocess.run([*command, '--cfg-options', *options], cwd=ROOT, check=True)
    metrics = json.loads(next(tmp_path.glob('*/*.json')).read_text())
    assert metrics['mIoU'] == pytest.approx(54.46, abs=0.02)
    assert [metrics[f'eval_keep_rate_{i}'] for i in range(3)] == [1.0, 1.0, 1.0]
