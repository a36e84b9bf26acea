"""The kernels in Triton's interpreter or compiled for CUDA, and what they are compared with.

No device is needed. The torch forms define what the kernels mean; they take the same arguments.
"""

import os
import sys

import pytest
import torch
import torch.nn.functional as F

from mmdynsparse.ops import cell_rows, cell_table, take_tiles
from mmdynsparse.ops.kernels import get_kernel
from mmdynsparse.ops.kernels.arguments import check_cell_conv, check_sparse_mlp

PACKAGE = 'mmdynsparse.ops.kernels'


def sparse_mlp(x_PC, residual_PC, kept_K, dropped_M, mlp, fast=None):
    check_sparse_mlp(x_PC, residual_PC, kept_K, dropped_M, mlp, fast)
    x_KC = normed(x_PC.index_select(0, kept_K), mlp)
    hidden_KH = F.gelu(F.linear(x_KC, mlp.weight1, mlp.bias1))
    slow_KC = scaled(F.linear(hidden_KH, mlp.weight2, mlp.bias2), mlp.gamma)
    out_PC = residual_PC.index_copy(0, kept_K, slow_KC + residual_PC.index_select(0, kept_K))
    if fast is not None:
        x_MC = normed(x_PC.index_select(0, dropped_M), fast)
        fast_MC = scaled(F.linear(x_MC, fast.weight, fast.bias), fast.gamma)
        out_PC.index_copy_(0, dropped_M, fast_MC + residual_PC.index_select(0, dropped_M))
    return out_PC


def cell_conv(x_BCHW, cells_K, cell_size, weight, bias, dilation=1, relu=False):
    check_cell_conv(x_BCHW, cells_K, cell_size, weight, bias, dilation)
    halo = dilation * (weight.shape[-1] // 2)
    rows = cell_rows(cells_K, len(x_BCHW), tuple(x_BCHW.shape[2:]), cell_size, halo)
    tiles = take_tiles(cell_table(x_BCHW), rows.tile, cell_size + 2 * halo)
    out = F.conv2d(tiles, weight, bias, dilation=dilation)
    out = out.contiguous(memory_format=torch.channels_last)
    return out.relu() if relu else out


def normed(x, weights):
    return F.layer_norm(x, x.shape[-1:], weights.norm_weight, weights.norm_bias, weights.eps)


def scaled(x, gamma):
    return x if gamma is None else x * gamma


TORCH_FORMS = dict(sparse_mlp=sparse_mlp, cell_conv=cell_conv)


def form_of(name, form='triton'):
    return TORCH_FORMS[name] if form == 'torch' else get_kernel(name)


def forget_kernels():
    for name in [name for name in sys.modules if name.startswith(f'{PACKAGE}.triton_')]:
        del sys.modules[name]


@pytest.fixture(scope='module')
def interpreted():
    """Function of a kernel's name and a form: in torch, or in Triton's interpreter."""
    pytest.importorskip('triton', reason='Triton is not installed')
    import triton.language as tl

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TRITON_INTERPRET', '1')
        # Triton's own functions are interpreted only if Triton is imported under the variable;
        # other tests may have imported it before. The kernels use this one of them.
        patch.setattr(tl, 'sum', lambda x, axis: tl.reduce(x, axis, tl.standard._sum_combine))
        forget_kernels()
        yield form_of
    forget_kernels()


@pytest.fixture(scope='module')
def compiled():
    """``get_kernel``, whose kernels are compiled for CUDA."""
    pytest.importorskip('triton', reason='Triton is not installed')
    if os.environ.get('TRITON_INTERPRET'):
        pytest.skip('TRITON_INTERPRET is set: nothing is compiled')
    forget_kernels()
    yield get_kernel
    forget_kernels()
