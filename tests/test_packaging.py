"""What a wheel carries, and that it serves a config from a folder without the checkout."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ('mmdynsparse', 'configs', 'tools')
FILES = ('pyproject.toml', 'setup.py', 'MANIFEST.in', 'README.md', 'LICENSE', 'model-index.yml')
MIM = 'mmdynsparse/.mim/'
# Builds a model from a config by its name in the package, as somebody without a checkout does.
USE = """
from pathlib import Path
import mmdynsparse.registry
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
assert Path(mmdynsparse.__file__).parents[1] == Path.cwd() / 'installed'
cfg = Config.fromfile('config.py')
init_default_scope(cfg.default_scope)
print(cfg.default_scope, type(MODELS.build(cfg.model)).__name__, cfg.train_cfg.max_iters)
"""


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """A wheel of this tree, built from a copy so that nothing is left in the tree."""
    folder = tmp_path_factory.mktemp('wheel')
    ignored = shutil.ignore_patterns('__pycache__')
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / 'src' / name, symlinks=True, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, folder / 'src' / name)
    build = 'from setuptools import build_meta; build_meta.build_wheel("../dist")'
    (folder / 'dist').mkdir()
    command = [sys.executable, '-c', build]
    subprocess.run(command, cwd=folder / 'src', check=True, capture_output=True)
    (path,) = (folder / 'dist').iterdir()
    return path


def test_carries_configs_tools_and_index(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith(MIM)}
    files = [ROOT / 'model-index.yml']
    for folder in ('configs', 'tools'):
        paths = (ROOT / folder).rglob('*')
        files += [path for path in paths if path.suffix in {'.py', '.sh', '.yml', '.md'}]
    assert names == {MIM + str(path.relative_to(ROOT)) for path in files}


def test_index_names_every_metafile_and_they_are_valid():
    """What ``mim search`` reads: each model has a collection and a config that exists."""
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']
    found = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob('configs/*/metafile.yml'))
    assert index == found
    for name in index:
        content = yaml.safe_load((ROOT / name).read_text())
        collections = {item['Name']: item for item in content['Collections']}
        assert all((ROOT / item['README']).is_file() for item in collections.values())
        for model in content['Models']:
            assert model['In Collection'] in collections
            assert (ROOT / model['Config']).is_file()
            assert model['Name'] == Path(model['Config']).stem


@pytest.mark.parametrize(
    ('base', 'expected'),
    [
        (
            'sparse_swin/sparse-swin-n_upernet_1xb8-2k_camvid-256x256.py',
            'mmseg EncoderDecoder 7',
        ),
        (
            'sparse_resnet/mask-rcnn_sparse-r50-n_fpn_1xb2-2k_camvid.py',
            'mmdet MaskRCNN 7',
        ),
    ],
)
def test_serves_configs_by_name(wheel, tmp_path, base, expected):
    pytest.importorskip(expected.split()[0])
    zipfile.ZipFile(wheel).extractall(tmp_path / 'installed')
    text = f"_base_ = 'mmdynsparse::{base}'\ntrain_cfg = dict(max_iters=7)\n"
    (tmp_path / 'config.py').write_text(text)
    environment = {'PYTHONPATH': str(tmp_path / 'installed'), 'PATH': '/usr/bin:/bin'}
    result = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', USE],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.stdout.splitlines()[-1:] == [expected], result.stderr


def test_names_no_distribution_of_openmmlab(wheel):
    """Installing without an extra touches no mmengine, mmcv, mmseg or mmdet, original or fork."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith('/METADATA')]
        metadata = archive.read(name).decode()
    required = re.findall(r'^Requires-Dist: ([^;\n]+)$', metadata, flags=re.MULTILINE)
    assert sorted(re.split(r'[<>=]', item)[0].strip() for item in required) == ['numpy', 'torch']
