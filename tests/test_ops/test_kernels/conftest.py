"""The Triton forms, interpreted on the CPU or compiled for a device that need not be there."""

import os
import sys

import pytest

PACKAGE = 'mmdynsparse.ops.kernels'


def forget_triton_forms():
    for name in [name for name in sys.modules if name.startswith(f'{PACKAGE}.triton_')]:
        del sys.modules[name]


@pytest.fixture(scope='module')
def interpreted():
    """``get_kernel``, whose Triton forms run in Triton's interpreter."""
    pytest.importorskip('triton', reason='Triton is not installed')
    import triton.language as tl

    from mmdynsparse.ops.kernels import get_kernel

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TRITON_INTERPRET', '1')
        # Triton's own functions are interpreted only if Triton is imported under the variable;
        # other tests may have imported it before. The kernels use this one of them.
        patch.setattr(tl, 'sum', lambda x, axis: tl.reduce(x, axis, tl.standard._sum_combine))
        forget_triton_forms()
        yield get_kernel
    forget_triton_forms()


@pytest.fixture(scope='module')
def compiled():
    """``get_kernel``, whose Triton forms are compiled for CUDA."""
    pytest.importorskip('triton', reason='Triton is not installed')
    if os.environ.get('TRITON_INTERPRET'):
        pytest.skip('TRITON_INTERPRET is set: nothing is compiled')
    from mmdynsparse.ops.kernels import get_kernel

    forget_triton_forms()
    yield get_kernel
    forget_triton_forms()
