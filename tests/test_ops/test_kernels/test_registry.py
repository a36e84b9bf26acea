import subprocess
import sys

import pytest
import torch

from mmdynsparse.ops import kernels
from mmdynsparse.ops.kernels import KERNELS, get_kernel


@pytest.mark.parametrize('op', KERNELS)
def test_torch_is_the_default(op):
    assert get_kernel(op) is get_kernel(op, 'torch')
    assert get_kernel(op).__name__ == op


def test_unknown_names():
    with pytest.raises(ValueError, match=r"op must be one of \['cell_conv', 'sparse_mlp'\], got"):
        get_kernel('conv')
    with pytest.raises(ValueError, match=r"name must be one of .* for cell_conv, got 'cuda'"):
        get_kernel('cell_conv', 'cuda')


def test_without_triton(monkeypatch):
    monkeypatch.setattr(kernels, 'find_spec', lambda name: None)
    with pytest.raises(RuntimeError, match='needs Triton, which is not installed'):
        get_kernel('sparse_mlp', 'triton')


def test_triton_is_imported_only_for_its_form():
    code = (
        'import sys; from mmdynsparse.ops.kernels import get_kernel; '
        "get_kernel('cell_conv'); assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, '-c', code], check=True)


def test_cpu_tensors_need_the_interpreter(compiled):
    x = torch.zeros(1, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match='takes tensors on a CUDA device, got one on cpu; use the'):
        compiled('cell_conv', 'triton')(x, torch.tensor([0]), 4, torch.zeros(4, 4, 1, 1), None)
