import subprocess
import sys

import pytest
import torch

from mmdynsparse.ops import kernels
from mmdynsparse.ops.kernels import get_kernel


def test_unknown_name():
    with pytest.raises(ValueError, match=r"name must be one of \['cell_conv', 'sparse_mlp'\], got"):
        get_kernel('conv')


def test_without_triton(monkeypatch):
    monkeypatch.setattr(kernels, 'find_spec', lambda name: None)
    with pytest.raises(RuntimeError, match='sparse_mlp needs Triton, which is not installed'):
        get_kernel('sparse_mlp')


def test_triton_is_imported_only_for_a_kernel(compiled):
    code = (
        'import sys; import mmdynsparse.models; from mmdynsparse.ops.kernels import get_kernel; '
        "assert 'triton' not in sys.modules; get_kernel('cell_conv')"
    )
    subprocess.run([sys.executable, '-c', code], check=True)


def test_cpu_tensors_need_the_interpreter(compiled):
    x = torch.zeros(1, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    with pytest.raises(
        ValueError, match='takes tensors on a CUDA device, got one on cpu; use exec'
    ):
        compiled('cell_conv')(x, torch.tensor([0]), 4, torch.zeros(4, 4, 1, 1), None)
