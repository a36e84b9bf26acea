"""The kernels compile for CUDA devices; Triton brings the assembler, no device is needed."""

from importlib import import_module

import pytest
import torch

CONSTANTS = {
    'hidden_kernel': dict(C=384, H=1536),
    'output_kernel': dict(C=384, H=1536),
    'linear_kernel': dict(C=384),
    'conv_kernel': dict(C_IN=256, C_OUT=256, CELL=8, KERNEL=3, DILATION=1, RELU=True),
}
INDICES = ('kept_ptr', 'dropped_ptr', 'cells_ptr')
# Shared memory of one program, bytes: compute capability 8.0 (A100) and 9.0 (H100).
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}


@pytest.fixture
def compile_kernel(compiled, tmp_path, monkeypatch):
    """Function that compiles a kernel as a launch on aligned tensors would."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))

    def function(name, dtype, blocks, capability):
        module = 'triton_conv' if name == 'conv_kernel' else 'triton_mlp'
        kernel = getattr(import_module(f'mmdynsparse.ops.kernels.{module}'), name)
        m, n, k, warps, stages = blocks
        constants = dict(CONSTANTS[name], WIDEN=False, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k)
        signature, attributes = {}, {}
        for i, argument in enumerate(kernel.arg_names):
            if argument in constants:
                signature[argument] = 'constexpr'
            elif argument.endswith('_ptr'):
                signature[argument] = '*i64' if argument in INDICES else f'*{dtype}'
                attributes[(i,)] = [['tt.divisibility', 16]]
            else:
                signature[argument] = 'fp32' if argument == 'eps' else 'i32'
        return compile(
            ASTSource(kernel, signature, constants, attributes),
            target=GPUTarget('cuda', capability, 32),
            options=dict(num_warps=warps, num_stages=stages),
        )

    return function


@pytest.mark.parametrize('capability', SHARED_MEMORY)
@pytest.mark.parametrize('name', CONSTANTS)
@pytest.mark.parametrize('dtype', ['bf16', 'fp16', 'fp32'])
def test_largest_blocks(compile_kernel, name, dtype, capability):
    blocks = all_blocks(name, dtype)[0]
    check(compile_kernel(name, dtype, blocks, capability), dtype, capability)


@pytest.mark.slow
@pytest.mark.parametrize('capability', SHARED_MEMORY)
@pytest.mark.parametrize('name', CONSTANTS)
@pytest.mark.parametrize('dtype', ['bf16', 'fp32'])
def test_all_blocks(compile_kernel, name, dtype, capability):
    for blocks in all_blocks(name, dtype):
        check(compile_kernel(name, dtype, blocks, capability), dtype, capability)


def all_blocks(name, dtype):
    common = import_module('mmdynsparse.ops.kernels.triton_common')
    if dtype == 'fp32':
        return common.FLOAT_BLOCKS
    wide = import_module('mmdynsparse.ops.kernels.triton_conv').WIDE_BLOCKS
    return (wide if name == 'conv_kernel' else ()) + common.HALF_BLOCKS


def check(binary, dtype, capability):
    ptx = binary.asm['ptx']
    assert len(binary.asm['cubin']) > 0
    assert binary.metadata.shared <= SHARED_MEMORY[capability]
    # Half precision runs on the tensor cores, float32 without rounding to tf32.
    assert ('mma' in ptx) == (dtype != 'fp32')
    assert 'cp.async' in ptx, 'loads are not pipelined'


def test_blocks_are_tuned_among_those_of_the_dtype(compiled):
    compiled('sparse_mlp')
    common = import_module('mmdynsparse.ops.kernels.triton_common')
    tuner = import_module('mmdynsparse.ops.kernels.triton_mlp')._hidden
    for dtype, blocks in (
        (torch.float32, common.FLOAT_BLOCKS),
        (torch.bfloat16, common.HALF_BLOCKS),
    ):
        tensor = torch.zeros(1, dtype=dtype)
        configs = tuner.early_config_prune(tuner.configs, dict(weight_ptr=tensor))
        assert len(configs) == len(blocks)
        assert [c.kwargs['BLOCK_K'] for c in configs] == [b[2] for b in blocks]
