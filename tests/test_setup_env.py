import ast
import collections
import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A check that fails to stop set-up must not download gigabytes.
OFFLINE = {'PIP_CONFIG_FILE': os.devnull, 'PIP_FIND_LINKS': '', 'PIP_NO_INDEX': '1'}


@pytest.fixture
def checkout(tmp_path):
    """A checkout with nothing but what set-up reads."""
    root = tmp_path / 'checkout'
    root.mkdir()
    shutil.copytree(ROOT / 'tools', root / 'tools', ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copytree(ROOT / 'requirements', root / 'requirements')
    shutil.copy(ROOT / 'Makefile', root)
    return root


@pytest.fixture
def setup_env(checkout, monkeypatch):
    """The set-up of that checkout as a module, with an empty folder of wheels."""
    for name, value in {**OFFLINE, 'MMDYNSPARSE_WHEELS': str(checkout / 'wheels')}.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location('setup_env', checkout / 'tools' / 'setup_env.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_setup(checkout, **environment):
    """Run ``make setup`` with a PATH of make alone, so no compiler is found."""
    binaries = checkout / 'bin'
    binaries.mkdir()
    (binaries / 'make').symlink_to(shutil.which('make'))
    # Of a virtual environment's Python the link would not find its own libraries.
    environment = {
        **OFFLINE,
        'PATH': str(binaries),
        'PYTHON': os.path.realpath(sys.executable),
        'MMDYNSPARSE_WHEELS': str(checkout / 'wheels'),
        **environment,
    }
    return subprocess.run(
        ['make', 'setup'], cwd=checkout, env=environment, capture_output=True, text=True
    )


def wheel_at(setup_env, entries=('mmcv/_ext.so',)):
    """Write a wheel with these entries where set-up keeps the one of mmcv."""
    folder = setup_env.wheel_folder('cpu')
    folder.mkdir(parents=True)
    python = f'cp{sys.version_info[0]}{sys.version_info[1]}'
    platform = setup_env.sysconfig.get_platform().replace('-', '_').replace('.', '_')
    version = setup_env.pin('openmmlab.txt', 'onedl-mmcv')
    path = folder / f'onedl_mmcv-{version}-{python}-{python}-{platform}.whl'
    with zipfile.ZipFile(path, 'w') as wheel:
        for entry in entries:
            wheel.writestr(entry, b'0' * 1000)
    return path


def finished_environment(setup_env):
    """Write a stamped environment whose Python is the one of the tests."""
    setup_env.PYTHON.parent.mkdir(parents=True)
    setup_env.PYTHON.symlink_to(sys.executable)
    setup_env.STAMP.write_text(setup_env.fingerprint())


def test_no_compiler_is_one_line_and_leaves_nothing(checkout):
    result = make_setup(checkout)
    lines = result.stderr.splitlines()
    assert result.returncode != 0
    assert lines[0].startswith('setup: no C++ compiler (c++)') and 'g++' in lines[0]
    assert len(lines) == 2 and lines[1].startswith('make: ***')
    assert not (checkout / '.venv').exists()


def test_compiler_named_by_cxx_is_looked_for(checkout):
    result = make_setup(checkout, CXX='ccache-of-nobody g++')
    assert 'setup: no C++ compiler (ccache-of-nobody)' in result.stderr


def test_missing_python_headers(setup_env, monkeypatch):
    monkeypatch.setenv('CXX', sys.executable)
    monkeypatch.setattr(setup_env.sysconfig, 'get_path', lambda name: '/nowhere/include')
    with pytest.raises(SystemExit, match=r'/nowhere/include/Python\.h.* apt install python3-dev'):
        setup_env.check_compiler()


def test_a_kept_wheel_needs_no_compiler(setup_env, monkeypatch):
    monkeypatch.setenv('PATH', '')
    monkeypatch.delenv('CXX', raising=False)
    with pytest.raises(SystemExit, match='no C'):
        setup_env.check_compiler()
    wheel_at(setup_env)
    setup_env.check_compiler()


@pytest.mark.parametrize('version', [(3, 9, 18), (3, 14, 0), (4, 0, 0)])
def test_wrong_python(setup_env, monkeypatch, version):
    monkeypatch.setattr(setup_env.sys, 'version_info', version)
    found = f'{version[0]}.{version[1]}'
    with pytest.raises(SystemExit, match=rf'^setup: Python 3\.10 to 3\.13 is needed.* {found};'):
        setup_env.main()
    assert not setup_env.VENV.exists()


@pytest.mark.parametrize('version', [(3, 10, 0), (3, 13, 9)])
def test_right_python(setup_env, monkeypatch, version):
    monkeypatch.setattr(setup_env.sys, 'version_info', version)
    setup_env.check_python()


def test_old_python_can_read_the_script():
    ast.parse((ROOT / 'tools' / 'setup_env.py').read_text(), feature_version=(3, 6))


def test_python_without_venv(setup_env, monkeypatch):
    monkeypatch.setattr(setup_env.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(SystemExit, match='apt install python3-venv'):
        setup_env.check_python()


def test_too_little_disk(setup_env, monkeypatch):
    usage = collections.namedtuple('usage', 'total used free')
    monkeypatch.setattr(setup_env.shutil, 'disk_usage', lambda path: usage(9e10, 8.6e10, 4e9))
    wheel_at(setup_env)
    with pytest.raises(SystemExit, match=r'^setup: 12 GB of free disk are needed .* 4\.0 GB'):
        setup_env.main()
    assert not setup_env.VENV.exists()


def test_disk_of_the_replaced_environment_counts_as_free(setup_env, monkeypatch):
    usage = collections.namedtuple('usage', 'total used free')
    monkeypatch.setattr(setup_env.shutil, 'disk_usage', lambda path: usage(9e10, 8.2e10, 8e9))
    monkeypatch.setattr(setup_env, 'disk_used', lambda folder: 5e9)
    setup_env.check_disk()


def test_only_one_setup_at_a_time(setup_env):
    descriptor = os.open(setup_env.ROOT, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(SystemExit, match='another set-up'), setup_env.only_one():
        pass
    os.close(descriptor)
    with setup_env.only_one():
        pass


def test_wheel_is_kept_under_the_torch_version(setup_env):
    torch = setup_env.pin('runtime.txt', 'torch')
    assert setup_env.wheel_folder('cpu').name == f'torch{torch}'
    assert setup_env.wheel_folder('cuda').name == f'torch{torch}-cuda'


def test_wheel_without_ops_or_cut_short_is_not_used(setup_env):
    path = wheel_at(setup_env)
    assert setup_env.find_wheel(path.parent) == path
    path.write_bytes(path.read_bytes()[:500])
    assert setup_env.find_wheel(path.parent) is None
    shutil.rmtree(path.parent)
    wheel_at(setup_env, entries=('mmcv/__init__.py',))
    assert setup_env.find_wheel(path.parent) is None


def test_failed_step_is_one_line_with_its_error(setup_env, capsys):
    code = 'print("Collecting x"); import sys; sys.exit("ERROR: no matching distribution")'
    with pytest.raises(SystemExit) as raised:
        setup_env.run('installing x: 1 GB', [sys.executable, '-c', code], dict(os.environ))
    message = 'setup: installing x failed, see .setup.log: ERROR: no matching distribution'
    assert str(raised.value) == message
    assert 'installing x: 1 GB' in capsys.readouterr().out


def test_environment_is_ready_only_with_its_stamp(setup_env, monkeypatch):
    # The probe itself is about the real packages; here it is about when it is asked.
    monkeypatch.setattr(setup_env, 'PROBE', '')
    finished_environment(setup_env)
    assert setup_env.environment_ready()
    (setup_env.REQUIREMENTS / 'runtime.txt').write_text('torch==2.12.0\n')
    assert not setup_env.environment_ready()
    setup_env.STAMP.unlink()
    assert not setup_env.environment_ready()


def test_environment_with_a_broken_python_is_not_ready(setup_env, monkeypatch):
    monkeypatch.setattr(setup_env, 'PROBE', '')
    finished_environment(setup_env)
    setup_env.PYTHON.unlink()
    setup_env.PYTHON.symlink_to('/nowhere/python')
    assert not setup_env.environment_ready()


def test_environment_of_a_moved_checkout_is_not_ready(setup_env, monkeypatch):
    monkeypatch.setattr(setup_env, 'PROBE', '')
    finished_environment(setup_env)
    monkeypatch.setattr(setup_env, 'ROOT', setup_env.ROOT / 'elsewhere')
    assert not setup_env.environment_ready()


def test_environment_without_the_packages_is_not_ready(setup_env):
    finished_environment(setup_env)
    assert not setup_env.environment_ready()


def fake_steps(setup_env, monkeypatch, fail_at=None):
    """Record the steps in place of running them; one of them may end as a failure."""
    titles = []

    def run(title, command, environment):
        titles.append(title.split(':')[0])
        if title.startswith('creating'):
            shutil.rmtree(setup_env.VENV, ignore_errors=True)
            setup_env.PYTHON.parent.mkdir(parents=True)
            setup_env.PYTHON.symlink_to(sys.executable)
        if fail_at and title.startswith(fail_at):
            setup_env.fail('stopped')

    monkeypatch.setattr(setup_env, 'run', run)
    monkeypatch.setattr(setup_env, 'cuda_ops', lambda: False)
    return titles


def test_rerun_goes_on_from_the_compilation(setup_env, monkeypatch):
    titles = fake_steps(setup_env, monkeypatch, fail_at='compiling')
    with pytest.raises(SystemExit):
        setup_env.install()
    assert titles[-1] == 'compiling mmcv for cpu, once'

    wheel_at_folder = setup_env.wheel_folder('cpu')
    shutil.rmtree(wheel_at_folder)
    wheel_at(setup_env)
    titles = fake_steps(setup_env, monkeypatch)
    setup_env.install()
    assert titles[0] == 'installing mmcv, mmdet and mmseg'
    assert setup_env.stamped(setup_env.STAMP)


@pytest.mark.parametrize('step', ['installing torch', 'installing mmdynsparse', 'checking'])
def test_rerun_after_a_broken_installation_starts_anew(setup_env, monkeypatch, step):
    wheel_at(setup_env)
    fake_steps(setup_env, monkeypatch, fail_at=step)
    with pytest.raises(SystemExit):
        setup_env.install()
    assert not setup_env.STAMP.exists()

    titles = fake_steps(setup_env, monkeypatch)
    setup_env.install()
    assert titles[0] == 'creating .venv'
    assert setup_env.stamped(setup_env.STAMP)
