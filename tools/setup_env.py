"""Create ``.venv`` in the project root with every pinned dependency and mmcv's compiled ops.

mmcv is compiled once; its wheel is kept in the folder that ``MMDYNSPARSE_WHEELS`` names, by
default ``.wheels``, below a name with the torch version. A finished environment carries a stamp,
which makes a second run take a second. Without it the environment is built again: from nothing,
or from the compilation on if that is where the earlier set-up stopped.

Standard library only, and readable by every Python 3, which can then say that it is too old.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / '.venv'
PYTHON = VENV / 'bin' / 'python'
STAMP = VENV / 'setup-stamp'
# There between the end of the libraries' installation and the start of the next one.
LIBRARIES_STAMP = VENV / 'libraries-stamp'
LOG = ROOT / '.setup.log'
REQUIREMENTS = ROOT / 'requirements'
# Of the environment; docs.txt is what "make docs" adds.
FILES = ('build.txt', 'openmmlab.txt', 'runtime.txt')
OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 13)
# GB on the disk of the project: the environment, and pip's downloads while it installs.
NEEDED_DISK = 12
START = time.time()

# What a finished environment must hold; cheap, since nothing large is imported.
PROBE = """
import importlib.metadata as metadata, importlib.util as util, sys
root, *pins = sys.argv[1:]
for pin in pins:
    name, version = pin.split('==')
    assert metadata.version(name).split('+')[0] == version, name
for module in ('torch', 'torchvision', 'timm', 'cv2', 'mmengine', 'mmcv', 'mmdet', 'mmseg'):
    assert util.find_spec(module), module
ops = [file for file in metadata.files('onedl-mmcv') if file.match('mmcv/_ext*.so')]
assert ops and ops[0].locate().exists(), 'mmcv ops'
assert util.find_spec('mmdynsparse').origin.startswith(root), 'mmdynsparse'
"""

# What it must do, once, before the stamp is written.
CHECK = """
import cv2, pycocotools.mask, timm, torch, torchvision
import mmdet.models, mmseg.models, mmdynsparse
from mmcv.ops import nms
boxes = torch.tensor([[0., 0., 10., 10.], [1., 1., 10., 10.]])
kept, _ = nms(boxes, torch.tensor([0.9, 0.8]), 0.5)
assert len(kept) == 1, 'mmcv.ops.nms kept both of two overlapping boxes'
"""


def fail(message: object):
    """End the set-up with one line on stderr."""
    raise SystemExit(f'setup: {message}')


def say(message: str):
    """Print a line with the seconds since the start."""
    print(f'[{time.time() - START:4.0f} s] {message}', flush=True)


def pins(name: str) -> 'list[str]':
    """Return the ``package==version`` lines of a file of the requirements folder."""
    lines = (REQUIREMENTS / name).read_text().splitlines()
    return [line for line in lines if '==' in line and not line.startswith('#')]


def pin(name: str, package: str) -> str:
    """Return the pinned version of a package."""
    return next(line.split('==')[1] for line in pins(name) if line.split('==')[0] == package)


def fingerprint() -> str:
    """Return the hash of all pins and of the project's place, which an editable install fixes."""
    text = ''.join((REQUIREMENTS / file).read_text() for file in FILES)
    return hashlib.sha256(f'{text}{ROOT}'.encode()).hexdigest()


def stamped(stamp: Path) -> bool:
    """Return whether a stamp is there and was written for the present pins and place."""
    return stamp.is_file() and stamp.read_text() == fingerprint()


def venv_runs(*arguments: str) -> bool:
    """Return whether the environment's Python exists and runs these arguments without an error."""
    command = [str(PYTHON), '-I', *arguments]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def environment_ready() -> bool:
    """Return whether ``.venv`` was finished with the present pins and is still whole."""
    if not stamped(STAMP):
        return False
    wanted = [line for file in FILES for line in pins(file)]
    return venv_runs('-c', PROBE, str(ROOT), *wanted)


def libraries_ready() -> bool:
    """Return whether an unfinished set-up with this Python got as far as mmcv."""
    same_python = f'import sys; assert sys.version_info[:2] == {tuple(sys.version_info[:2])}'
    return stamped(LIBRARIES_STAMP) and venv_runs('-c', same_python)


def wheel_folder(ops: str) -> Path:
    """Return where mmcv's wheel is kept.

    Args:
        ops: 'cpu' or 'cuda', for which the ops are compiled.
    """
    base = Path(os.environ.get('MMDYNSPARSE_WHEELS') or '.wheels').expanduser()
    suffix = '-cuda' if ops == 'cuda' else ''
    return ROOT / base / f'torch{pin("runtime.txt", "torch")}{suffix}'


def find_wheel(folder: Path) -> 'Path | None':
    """Return a whole mmcv wheel with compiled ops for this Python and platform, if there is one."""
    python = 'cp{}{}'.format(*sys.version_info[:2])
    platform = sysconfig.get_platform().replace('-', '_').replace('.', '_')
    name = f'onedl_mmcv-{pin("openmmlab.txt", "onedl-mmcv")}-{python}-{python}-{platform}.whl'
    try:
        with zipfile.ZipFile(str(folder / name)) as wheel:
            compiled = any(entry.startswith('mmcv/_ext') for entry in wheel.namelist())
    except (OSError, zipfile.BadZipFile):
        return None
    return folder / name if compiled else None


def check_python():
    """Refuse a Python without wheels of the pinned torch and numpy, or without venv."""
    if not OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON:
        found = '.'.join(map(str, sys.version_info[:2]))
        fail(
            f'Python 3.{OLDEST_PYTHON[1]} to 3.{NEWEST_PYTHON[1]} is needed, {sys.executable} is '
            f'{found}; choose another one with PYTHON=, for example make setup PYTHON=python3.11'
        )
    if importlib.util.find_spec('ensurepip') is None:
        fail('this Python cannot create environments; on Debian: apt install python3-venv')


def check_compiler():
    """Refuse a machine that can neither compile mmcv nor has its wheel already."""
    if find_wheel(wheel_folder('cpu')) or find_wheel(wheel_folder('cuda')):
        return
    compiler = shlex.split(os.environ.get('CXX') or 'c++')[0]
    if shutil.which(compiler) is None:
        fail(f'no C++ compiler ({compiler}) to compile mmcv with; on Debian: apt install g++')
    header = Path(sysconfig.get_path('include')) / 'Python.h'
    if not header.is_file():
        fail(f'{header}, to compile mmcv with, is missing; on Debian: apt install python3-dev')


def disk_used(folder: Path) -> int:
    """Return the bytes that a folder occupies."""
    files = (Path(top) / name for top, _, names in os.walk(str(folder)) for name in names)
    return sum(file.lstat().st_blocks * 512 for file in files)


def check_disk():
    """Refuse a disk too small for the environment and the downloads."""
    free = (shutil.disk_usage(str(ROOT)).free + disk_used(VENV)) / 1e9
    if free < NEEDED_DISK:
        fail(f'{NEEDED_DISK} GB of free disk are needed in {ROOT}, {free:.1f} GB are free')


@contextlib.contextmanager
def only_one():
    """Let one set-up of this checkout run at a time.

    The descriptor is handed down, so a pip that outlives a killed set-up keeps the lock.
    """
    descriptor = os.open(str(ROOT), os.O_RDONLY)
    os.set_inheritable(descriptor, True)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        fail('another set-up of this checkout is still running')
    try:
        yield
    finally:
        os.close(descriptor)


def last_error() -> str:
    """Return the line of the log that says most about a failure."""
    lines = [line.strip() for line in LOG.read_text(errors='replace').splitlines() if line.strip()]
    errors = [line for line in lines if 'error:' in line.lower()]
    return errors[0] if errors else (lines or ['no output'])[-1]


def wait(process: 'subprocess.Popen') -> int:
    """Return the exit status of a step, with a sign of life every 30 s until it has one."""
    while True:
        try:
            return process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            compiled = re.findall(r'^\s*\[(\d+/\d+)\]', LOG.read_text(errors='replace'), re.M)
            say(f'  {compiled[-1]} files compiled' if compiled else '  still at it')


def run(title: str, command: 'list[str]', environment: 'dict[str, str]'):
    """Run one step with its output in the log, and show that it is alive.

    Args:
        title: What the step does; after a colon, what to expect.
        command: The program and its arguments.
        environment: All environment variables of the step.

    Raises:
        SystemExit: The command failed; the message holds its error.
    """
    say(title)
    with LOG.open('w') as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, cwd=str(ROOT), close_fds=False
        )
        try:
            code = wait(process)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if code:
        fail(f'{title.split(":")[0]} failed, see {LOG.name}: {last_error()}')


def create_venv():
    """Replace ``.venv`` by an empty virtual environment."""
    if VENV.is_symlink() or VENV.is_file():
        VENV.unlink()
    # The real interpreter: sys.executable may lie in the very environment that goes.
    run(
        'creating .venv',
        [os.path.realpath(sys.executable), '-m', 'venv', '--clear', str(VENV)],
        dict(os.environ),
    )


def cuda_ops() -> bool:
    """Return whether mmcv's ops can be compiled for a GPU here: one is visible, nvcc is there."""
    code = (
        'import torch, torch.utils.cpp_extension as extension;'
        'print(torch.cuda.is_available() and extension.CUDA_HOME is not None)'
    )
    output = subprocess.run([str(PYTHON), '-I', '-c', code], capture_output=True).stdout
    return output.split()[-1:] == [b'True'] or os.environ.get('FORCE_CUDA') == '1'


def compile_mmcv(ops: str, built: Path, environment: 'dict[str, str]') -> Path:
    """Compile mmcv.

    Args:
        ops: 'cpu' or 'cuda', for which the ops are compiled.
        built: Folder for the wheel.
        environment: All environment variables of the compiler.

    Returns:
        Path of the wheel.

    Raises:
        SystemExit: The wheel could not be built or has no ops.
    """
    memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    jobs = max(1, min(len(os.sched_getaffinity(0)), int(memory / 2e9)))
    environment = {'MAX_JOBS': str(jobs), **environment}
    if ops == 'cpu':
        environment['CUDA_VISIBLE_DEVICES'] = ''
    # pip's cache is keyed by the source, not by torch, and isolation would hide torch: either
    # can give a wheel whose ops are missing or do not load.
    command = [str(PYTHON), '-m', 'pip', 'wheel', '-v', '--no-deps', '--no-build-isolation']
    command += ['--no-cache-dir', '--no-binary=onedl-mmcv', f'--wheel-dir={built}']
    command += [line for line in pins('openmmlab.txt') if line.startswith('onedl-mmcv==')]
    run(f'compiling mmcv for {ops}, once: about 10 min on 2 cores', command, environment)
    wheel = find_wheel(built)
    if wheel is None:
        fail(f'mmcv was built without its compiled ops, see {LOG.name}')
    return wheel


def mmcv_wheel(scratch: Path, environment: 'dict[str, str]') -> Path:
    """Return mmcv's wheel from the folder of wheels, compiled now unless it is there already.

    Args:
        scratch: Folder for a wheel that is not whole yet.
        environment: All environment variables of the compiler.

    Returns:
        Path of the wheel.
    """
    ops = 'cuda' if cuda_ops() else 'cpu'
    folder = wheel_folder(ops)
    kept = find_wheel(folder)
    if kept:
        say(f'mmcv is compiled already: {kept}')
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    wheel = compile_mmcv(ops, scratch / 'wheel', environment)
    # The folder may lie on another disk, where only a rename within it is atomic.
    partial = folder / f'{wheel.name}.partial'
    shutil.copyfile(str(wheel), str(partial))
    os.replace(str(partial), str(folder / wheel.name))
    return folder / wheel.name


def install_libraries(pip: 'list[str]', environment: 'dict[str, str]'):
    """Put everything that mmcv is compiled against, and the other libraries, into the environment.

    Args:
        pip: The command to which the requirements are appended.
        environment: All environment variables of pip.
    """
    build_tools = [*pip, '-r', str(REQUIREMENTS / 'build.txt')]
    run('installing the build tools', build_tools, environment)
    libraries = [*pip, '-r', str(REQUIREMENTS / 'runtime.txt')]
    run('installing torch and the libraries: 2 GB to download', libraries, environment)
    LIBRARIES_STAMP.write_text(fingerprint())


def install():
    """Fill ``.venv`` and check that it works."""
    resumed = libraries_ready()
    if resumed:
        say('the libraries are there from an earlier set-up')
    else:
        create_venv()
    scratch = VENV / 'tmp'
    shutil.rmtree(str(scratch), ignore_errors=True)
    scratch.mkdir()
    # The system's temporary folder is often a small memory disk.
    environment = {**os.environ, 'TMPDIR': str(scratch)}
    # pip would count what lies there as installed.
    environment.pop('PYTHONPATH', None)
    pip = [str(PYTHON), '-m', 'pip', 'install', '--disable-pip-version-check']
    bare = [*pip, '--no-deps', '--no-build-isolation']
    if not resumed:
        install_libraries(pip, environment)
    wheel = mmcv_wheel(scratch, environment)
    LIBRARIES_STAMP.unlink()
    openmmlab = [*bare, str(wheel), '-r', str(REQUIREMENTS / 'openmmlab.txt')]
    run('installing mmcv, mmdet and mmseg', openmmlab, environment)
    run('installing mmdynsparse', [*bare, '-e', str(ROOT)], environment)
    run('checking mmcv.ops, mmseg, mmdet, timm', [str(PYTHON), '-I', '-c', CHECK], environment)
    shutil.rmtree(str(scratch))
    STAMP.write_text(fingerprint())


def main():
    """Set up the environment unless it is ready."""
    if environment_ready():
        return
    check_python()
    check_compiler()
    with only_one():
        check_disk()
        if VENV.exists():
            say('.venv is unfinished or outdated: repairing it')
        install()
    LOG.unlink()
    say('.venv is ready')


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        fail('interrupted; run it again to finish')
    except OSError as error:
        fail(error)
