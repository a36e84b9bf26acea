import pytest
import torch
import torch.nn.functional as F

from mmdynsparse.ops.kernels import LinearWeights, MlpWeights

# Not multiples of the blocks (16 rows, 32 columns, depth 16 in the interpreter).
P, C, H = 45, 40, 72
# Values are about 1. Half precision (epsilon 1e-3 and 8e-3) rounds the normalised value and the
# hidden one, absolute, and the result, relative; the interpreter cuts bfloat16 off instead.
TOLERANCE = {
    torch.float32: dict(atol=2e-6, rtol=0),
    torch.float16: dict(atol=2e-3, rtol=1e-3),
    torch.bfloat16: dict(atol=2e-2, rtol=8e-3),
}


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape).div(shape[-1] ** 0.5).to(dtype)


def mlp_of(c, h, gamma, dtype=torch.float32):
    scale = torch.rand(c).to(dtype) if gamma else None
    norm = (torch.rand(c).to(dtype) + 0.5, normal(c, dtype=dtype), 1e-5)
    first = normal(h, c, dtype=dtype), normal(h, dtype=dtype)
    return MlpWeights(*norm, *first, normal(c, h, dtype=dtype), normal(c, dtype=dtype), scale)


def linear_of(c, gamma, dtype=torch.float32):
    scale = torch.rand(c).to(dtype) if gamma else None
    norm = (torch.rand(c).to(dtype) + 0.5, normal(c, dtype=dtype), 1e-6)
    return LinearWeights(*norm, normal(c, c, dtype=dtype), normal(c, dtype=dtype), scale)


def positions(kept, total):
    """Sorted positions of ``kept`` random rows and of the others."""
    order = torch.randperm(total)
    return order[:kept].sort().values, order[kept:].sort().values


def widened(weights):
    return weights._replace(
        **{k: v.float() for k, v in weights._asdict().items() if isinstance(v, torch.Tensor)}
    )


def dense(x, residual, kept, mlp, fast):
    """Both paths everywhere, combined by a mask, in float32."""
    x, residual, mlp = x.float(), residual.float(), widened(mlp)
    normed = F.layer_norm(x, x.shape[-1:], mlp.norm_weight, mlp.norm_bias, mlp.eps)
    hidden = F.gelu(F.linear(normed, mlp.weight1, mlp.bias1))
    slow = F.linear(hidden, mlp.weight2, mlp.bias2)
    slow = slow if mlp.gamma is None else slow * mlp.gamma
    light = torch.zeros_like(x)
    if fast is not None:
        fast = widened(fast)
        normed = F.layer_norm(x, x.shape[-1:], fast.norm_weight, fast.norm_bias, fast.eps)
        light = F.linear(normed, fast.weight, fast.bias)
        light = light if fast.gamma is None else light * fast.gamma
    mask = torch.zeros(len(x), 1).index_fill_(0, kept, 1)
    return residual + mask * slow + (1 - mask) * light


@pytest.mark.parametrize('form', ['torch', 'triton'])
@pytest.mark.parametrize('kept', [0, 1, 17, P])
@pytest.mark.parametrize('with_fast', [True, False])
@pytest.mark.parametrize('gamma', [True, False])
def test_equals_the_dense_computation(interpreted, form, kept, with_fast, gamma):
    x, residual = torch.randn(P, C), torch.randn(P, C)
    mlp, fast = mlp_of(C, H, gamma), linear_of(C, gamma) if with_fast else None
    kept_K, dropped_M = positions(kept, P)
    out = interpreted('sparse_mlp', form)(x, residual, kept_K, dropped_M, mlp, fast)
    expected = dense(x, residual, kept_K, mlp, fast)
    torch.testing.assert_close(out, expected, **TOLERANCE[x.dtype])
    if not with_fast:
        assert torch.equal(out[dropped_M], residual[dropped_M])


@pytest.mark.parametrize('form', ['torch', 'triton'])
@pytest.mark.parametrize('dtype', list(TOLERANCE), ids=str)
def test_dtypes(interpreted, form, dtype):
    x = torch.randn(P, C).to(dtype)
    mlp, fast = mlp_of(C, H, True, dtype), linear_of(C, True, dtype)
    kept_K, dropped_M = positions(20, P)
    before = x.clone()
    out = interpreted('sparse_mlp', form)(x, x, kept_K, dropped_M, mlp, fast)
    assert out.dtype == dtype
    assert torch.equal(x, before), 'the residual must not be written to'
    expected = dense(x, x, kept_K, mlp, fast)
    torch.testing.assert_close(out.float(), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_matrices_in_half_precision_among_float32(interpreted, dtype):
    """As under autocast; only the operands of the products are rounded."""
    x, residual = torch.randn(P, C), torch.randn(P, C)
    mlp, fast = mlp_of(C, H, True), linear_of(C, True)
    mlp = mlp._replace(weight1=mlp.weight1.to(dtype), weight2=mlp.weight2.to(dtype))
    fast = fast._replace(weight=fast.weight.to(dtype))
    kept_K, dropped_M = positions(20, P)
    out = interpreted('sparse_mlp')(x, residual, kept_K, dropped_M, mlp, fast)
    assert out.dtype == torch.float32
    expected = dense(x, residual, kept_K, mlp, fast)
    torch.testing.assert_close(out, expected, **TOLERANCE[dtype])


@pytest.mark.parametrize('dtype', list(TOLERANCE), ids=str)
@pytest.mark.parametrize('shape', [(16, 32, 64), (33, 16, 65), (5, 96, 31)])
def test_triton_equals_torch(interpreted, dtype, shape):
    p, c, h = shape
    x, residual = torch.randn(p, c).to(dtype), torch.randn(p, c).to(dtype)
    mlp, fast = mlp_of(c, h, False, dtype), linear_of(c, True, dtype)
    kept_K, dropped_M = positions(p // 2, p)
    arguments = (x, residual, kept_K, dropped_M, mlp, fast)
    expected = interpreted('sparse_mlp', 'torch')(*arguments)
    out = interpreted('sparse_mlp', 'triton')(*arguments)
    # Both are rounded.
    tolerance = {k: 2 * v for k, v in TOLERANCE[dtype].items()}
    torch.testing.assert_close(out, expected, **tolerance)


@pytest.mark.parametrize('form', ['torch', 'triton'])
def test_positions_that_repeat(interpreted, form):
    """Cells of a static size at the edge of a map name a token twice, in no order."""
    x, residual = torch.randn(P, C), torch.randn(P, C)
    mlp, fast = mlp_of(C, H, False), linear_of(C, False)
    kept_K, dropped_M = positions(20, P)
    repeated = [torch.cat((rows, rows[:3])).flip(0) for rows in (kept_K, dropped_M)]
    out = interpreted('sparse_mlp', form)(x, residual, *repeated, mlp, fast)
    expected = dense(x, residual, kept_K, mlp, fast)
    torch.testing.assert_close(out, expected, **TOLERANCE[x.dtype])


def test_strided_arguments(interpreted):
    x, residual = torch.randn(C, P).t(), torch.randn(P, 2 * C)[:, ::2]
    mlp, fast = mlp_of(C, H, False), linear_of(C, False)
    mlp = mlp._replace(weight1=mlp.weight1.t().contiguous().t())
    kept_K, dropped_M = positions(20, P)
    arguments = (x, residual, kept_K, dropped_M, mlp, fast)
    out = interpreted('sparse_mlp', 'triton')(*arguments)
    torch.testing.assert_close(
        out, interpreted('sparse_mlp', 'torch')(*arguments), atol=2e-6, rtol=0
    )


def test_large_mean_does_not_swamp_the_deviation(interpreted):
    x, residual = torch.randn(P, C) + 1e4, torch.zeros(P, C)
    kept_K, dropped_M = positions(20, P)
    mlp, fast = mlp_of(C, H, False), linear_of(C, False)
    out = interpreted('sparse_mlp', 'triton')(x, residual, kept_K, dropped_M, mlp, fast)
    # The same deviations without the mean; the subtraction is exact.
    expected = dense(x - 1e4, residual, kept_K, mlp, fast)
    # float32 resolves 1e-3 at 1e4, so a mean is known to about 1e-4.
    torch.testing.assert_close(out, expected, atol=2e-3, rtol=0)


def test_triton_form_refuses_gradients(interpreted):
    mlp, kept_K, dropped_M = mlp_of(C, H, False), *positions(20, P)
    mlp.weight2.requires_grad_()
    arguments = (torch.randn(P, C), torch.randn(P, C), kept_K, dropped_M, mlp)
    kernel = interpreted('sparse_mlp', 'triton')
    with pytest.raises(RuntimeError, match='no backward pass'):
        kernel(*arguments)
    with torch.no_grad():
        assert not kernel(*arguments).requires_grad


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(x_PC=torch.zeros(P, 2, C)), 'x_PC must have 2 dimensions'),
        (dict(residual_PC=torch.zeros(P, 8)), r'residual_PC must have shape \(45, 40\), got'),
        (dict(kept_K=torch.arange(3)), 'must hold all 45 rows of x_PC together, got 3 and 25'),
        (dict(kept_K=torch.arange(20).int()), 'kept_K must be int64 of 1 dimension, got'),
        (dict(dropped_M=torch.arange(25)[None]), r'dropped_M must be int64 .* \(1, 25\)'),
        (dict(mlp=mlp_of(C + 1, H, False)), r'mlp.norm_weight must have shape \(40,\), got'),
        (dict(fast=linear_of(C + 1, False)), r'fast.norm_weight must have shape \(40,\), got'),
        (dict(mlp=mlp_of(C, H, True, torch.float16)), 'one dtype torch.float16, got torch.float32'),
        (dict(x_PC=torch.zeros(P, C).double()), 'float32, float16 or bfloat16, got torch.float64'),
    ],
)
@pytest.mark.parametrize('form', ['torch', 'triton'])
def test_bad_arguments(interpreted, form, change, message):
    kept_K, dropped_M = positions(20, P)
    arguments = dict(
        x_PC=torch.zeros(P, C),
        residual_PC=torch.zeros(P, C),
        kept_K=kept_K,
        dropped_M=dropped_M,
        mlp=mlp_of(C, H, False),
        fast=linear_of(C, False),
    )
    with pytest.raises(ValueError, match=message):
        interpreted('sparse_mlp', form)(**(arguments | change))
