"""The shell scripts pass on what they are given."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def recorder(tmp_path: Path) -> Path:
    """A program that prints its arguments, one on a line."""
    program = tmp_path / 'srun'
    program.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    return program


@pytest.mark.parametrize(
    'name', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh', 'slurm_test.sh']
)
def test_too_few_arguments(name: str, run_tool: Callable) -> None:
    output = run_tool(name, 'config.py', code=2)
    assert output.startswith(f'{name}: error: usage: {name} ') and output.count('\n') == 1


def test_dist_train(run_tool: Callable, recorder: Path) -> None:
    args = ('config.py', 4, '--cfg-options', 'a=[1, 2]')
    env = dict(NNODES='2', NODE_RANK='1', PORT='1234', MASTER_ADDR='10.0.0.1')
    lines = run_tool('dist_train.sh', *args, PYTHON=str(recorder), **env).splitlines()
    expected = ['--nnodes=2', '--node_rank=1', '--master_addr=10.0.0.1', '--master_port=1234']
    assert lines[:2] == ['-m', 'torch.distributed.run'] and lines[2:6] == expected
    assert lines[6] == '--nproc_per_node=4' and lines[7].endswith('tools/train.py')
    assert lines[8:] == ['config.py', '--launcher', 'pytorch', '--cfg-options', 'a=[1, 2]']


def test_dist_test(run_tool: Callable, recorder: Path) -> None:
    lines = run_tool('dist_test.sh', 'c.py', 'x.pth', 3, '--tta', PYTHON=str(recorder)).splitlines()
    assert lines[6] == '--nproc_per_node=3' and lines[7].endswith('tools/test.py')
    assert lines[8:] == ['c.py', 'x.pth', '--launcher', 'pytorch', '--tta']


@pytest.mark.parametrize(
    ('given', 'expected'),
    [
        (['runs/a', '--amp'], ['--work-dir', 'runs/a', '--amp']),
        (['--amp'], ['--amp']),
        ([], []),
    ],
)
def test_slurm_train(
    given: list[str], expected: list[str], run_tool: Callable, recorder: Path
) -> None:
    env = dict(GPUS='4', GPUS_PER_NODE='2', SRUN_ARGS='--mem 8G')
    path = f'{recorder.parent}:{os.environ["PATH"]}'
    lines = run_tool('slurm_train.sh', 'part', 'job', 'c.py', *given, PATH=path, **env).splitlines()
    assert lines[:5] == ['-p', 'part', '--job-name=job', '--gres=gpu:2', '--ntasks=4']
    assert lines[lines.index('--mem') + 1] == '8G'
    assert lines[lines.index('c.py') :] == ['c.py', '--launcher', 'slurm', *expected]


def test_slurm_test(run_tool: Callable, recorder: Path) -> None:
    path = f'{recorder.parent}:{os.environ["PATH"]}'
    args = ('part', 'job', 'c.py', 'x.pth', '--out', 'a b')
    lines = run_tool('slurm_test.sh', *args, PATH=path).splitlines()
    expected = ['c.py', 'x.pth', '--launcher', 'slurm', '--out', 'a b']
    assert lines[lines.index('c.py') :] == expected
