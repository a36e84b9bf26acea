import argparse
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer

from mmdynsparse.models import SparseSwinTransformer
from mmdynsparse.utils.checkpoints import check_checkpoint, read_checkpoint

WEIGHTS = {'a.weight': torch.arange(3.0)}
# What other trainings than the one of a test below leave.
LOGS = dict(
    history=HistoryBuffer([1.0, 2.0], [1, 1]),
    numbers=[np.float64(0.5), np.arange(3)[::-1], np.bool_(True), np.array(['name'])],
    config=ConfigDict(model=dict(depth=2)),
    args=argparse.Namespace(lr=0.1),
)


class Command:
    """Runs a command of the shell when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class Own:
    """Harmless, but nobody can know."""


@pytest.mark.parametrize('zipped', [True, False])
def test_a_file_that_runs_commands_is_refused(zipped, tmp_path):
    path, ran = tmp_path / 'bad.pth', tmp_path / 'ran'
    content = dict(state_dict=WEIGHTS, meta=Command(f'touch {ran}'))
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"^load_from must hold weights .*bad.pth' with more \(po"):
        read_checkpoint('load_from', str(path))
    assert not ran.exists()


def test_a_downloaded_file_that_runs_commands_is_refused(address, tmp_path):
    folder, url = address
    ran = tmp_path / 'ran'
    torch.save(dict(state_dict=WEIGHTS, meta=Command(f'touch {ran}')), folder / 'bad.pth')
    with pytest.raises(ValueError, match=r"^src must hold weights .*http.*bad.pth' .*posix.system"):
        read_checkpoint('src', f'{url}/bad.pth')
    assert (tmp_path / 'home/hub/checkpoints/bad.pth').is_file() and not ran.exists()


def test_init_cfg_refuses_it_too(tmp_path, tiny_swin):
    torch.save(dict(state_dict=WEIGHTS, meta=Command(f'touch {tmp_path}/ran')), tmp_path / 'x.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'x.pth'))
    with pytest.raises(ValueError, match=r'^init_cfg.checkpoint must hold .*posix.system'):
        SparseSwinTransformer(**tiny_swin, init_cfg=init_cfg).init_weights()
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('more, reason', [(Own(), r'\w*test_files.Own'), (slice(1), 'slice')])
def test_the_error_says_how_to_convert_a_file(more, reason, tmp_path, monkeypatch):
    path = tmp_path / 'old.pth'
    torch.save(dict(model=WEIGHTS, epoch=more), path)
    with pytest.raises(ValueError, match=rf'with more \(\S*{reason}\)') as info:
        check_checkpoint('src', str(path))
    (line,) = re.findall(r'python -c "(.*)"$', str(info.value))
    # In this process, where the class of the test can be imported.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, Own.__module__, sys.modules[__name__])
    exec(line)
    assert read_checkpoint('src', 'weights.pth')['state_dict'].keys() == WEIGHTS.keys()


def test_another_protocol_of_pickle_can_be_converted(tmp_path):
    path = tmp_path / 'protocol.pth'
    torch.save(WEIGHTS, path, pickle_protocol=4)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match='must hold weights') as info:
        check_checkpoint('src', str(path))
    (line,) = re.findall(r'python -c "(.*)"$', str(info.value))
    subprocess.run([sys.executable, '-c', line], cwd=tmp_path, check=True)
    converted = check_checkpoint('src', str(tmp_path / 'weights.pth'))['state_dict']
    torch.testing.assert_close(dict(converted), WEIGHTS)


@pytest.mark.parametrize('download', [False, True])
def test_what_trainings_log_is_left_out(download, address):
    folder, url = address
    torch.save(dict(state_dict=WEIGHTS, meta=dict(classes=('a',)), logs=LOGS), folder / 'run.pth')
    checkpoint = read_checkpoint('src', f'{url if download else folder}/run.pth')
    torch.testing.assert_close(checkpoint['state_dict'], WEIGHTS)
    assert checkpoint['meta'] == dict(classes=('a',))
    assert not isinstance(checkpoint['logs']['history'], HistoryBuffer)
    # mmengine resumes from the same file.
    assert torch.load(folder / 'run.pth', weights_only=False)['logs']['history'].mean() == 1.5


def test_files_by_the_first_numpy(tmp_path):
    """Their pickles call the module ``numpy.core``."""
    torch.save(dict(state_dict=WEIGHTS, log=LOGS), tmp_path / 'new.pth')
    old = tmp_path / 'old.pth'
    torch.save(dict(state_dict=WEIGHTS, log=LOGS), old, _use_new_zipfile_serialization=False)
    old.write_bytes(old.read_bytes().replace(b'cnumpy._core', b'cnumpy.core'))
    assert b'cnumpy.core' in old.read_bytes()
    torch.testing.assert_close(check_checkpoint('src', str(old))['state_dict'], WEIGHTS)


def test_reading_changes_nothing_for_other_readers(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    torch.save(dict(log=LOGS), tmp_path / 'run.pth')
    check_checkpoint('src', str(tmp_path / 'run.pth'))
    torch.save(dict(own=Own()), tmp_path / 'own.pth')
    with pytest.raises(ValueError):
        check_checkpoint('src', str(tmp_path / 'own.pth'))
    assert set(torch.serialization.get_safe_globals()) == before


def test_addresses_are_not_opened() -> None:
    assert check_checkpoint('load_from', 'https://example.org/none.pth') == {}
