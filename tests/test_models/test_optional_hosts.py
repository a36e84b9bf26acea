import os
import subprocess
import sys

import pytest

PARTS = dict(mmseg='SparseUPerHead', mmdet='SparseFPN')
# Asks for a part of the library that is broken, then for parts that need it not.
SCRIPT = """
from mmengine.registry import MODELS, init_default_scope
from mmdynsparse.analysis import build_pair, dense_config

def refusal(ask):
    try:
        ask()
    except ValueError as error:
        return str(error)

part, other = 'mmdynsparse.{part}', 'mmdynsparse.{other}'
init_default_scope('{works}')
for ask in (
    lambda: MODELS.get(part),
    lambda: MODELS.build(dict(type=part)),
    lambda: dense_config(dict(type='Model', neck=dict(type=part))),
):
    print(refusal(ask))
assert MODELS.get(other).__name__ == '{other}'
swin = dict(type='mmdynsparse.SparseSwinTransformer', embed_dims=8, depths=(1, 1, 3, 1),
            num_heads=(1, 2, 2, 2), sparsity=dict(keep_ratio=0.7))
print(build_pair(swin).originals)
"""


@pytest.mark.parametrize(
    'broken, works, fault',
    [
        ('mmseg', 'mmdet', 'AssertionError("MMCV==9")'),
        ('mmdet', 'mmseg', 'ModuleNotFoundError("No module named mmdet")'),
    ],
)
def test_a_library_that_does_not_import_takes_only_its_own_parts_with_it(
    broken, works, fault, tmp_path
):
    """The others work, and who asks for one of its parts is told why it is not there."""
    pytest.importorskip(works)
    (tmp_path / broken).mkdir()
    (tmp_path / broken / '__init__.py').write_text(f'raise {fault}')
    script = SCRIPT.format(part=PARTS[broken], other=PARTS[works], works=works)
    done = subprocess.run(
        [sys.executable, '-c', script],
        env={**os.environ, 'PYTHONPATH': os.pathsep.join((str(tmp_path), *sys.path))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *refusals, originals = done.stdout.splitlines()
    error, _, text = fault.partition('(')
    extra = dict(mmseg='seg', mmdet='det')[broken]
    expected = f'{PARTS[broken]} must have its library, but {broken} could not be imported '
    expected += f'({error}: {text[1:-2]}): pip install mmdynsparse[{extra}]'
    assert [line.removeprefix('mmdynsparse.') for line in refusals] == [expected] * 3
    assert originals == f"['{works}.SwinTransformer']"
