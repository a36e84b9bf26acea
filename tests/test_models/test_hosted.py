import os
import subprocess
import sys

import pytest


def test_a_library_that_refuses_a_version_takes_only_its_own_parts_with_it(tmp_path):
    pytest.importorskip('mmdet')
    (tmp_path / 'mmseg').mkdir()
    (tmp_path / 'mmseg' / '__init__.py').write_text('raise AssertionError("MMCV==9")')
    script = (
        "\nfrom mmengine.registry import MODELS\nMODELS.get('mmdynsparse.SparseSwinTransformer')"
    )
    script += "\nassert MODELS.get('mmdynsparse.SparseFPN').__name__ == 'SparseFPN'"
    path = os.pathsep.join((str(tmp_path), *sys.path))
    done = subprocess.run(
        [sys.executable, '-c', script],
        env={**os.environ, 'PYTHONPATH': path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
