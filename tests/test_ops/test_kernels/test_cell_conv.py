import pytest
import torch
import torch.nn.functional as F

# Not multiples of the blocks (16 rows, 32 columns, depth 16 in the interpreter).
C_IN, C_OUT = 20, 40
# Sums are float32; half precision rounds only the result, by half of its epsilon (1e-3 and 8e-3).
# The interpreter cuts bfloat16 off instead, by up to a whole one.
TOLERANCE = {
    torch.float32: dict(atol=2e-6, rtol=0),
    torch.float16: dict(atol=2e-6, rtol=6e-4),
    torch.bfloat16: dict(atol=2e-6, rtol=8e-3),
}


def feature_map(b, h, w, dtype=torch.float32):
    x = torch.randn(b, C_IN, h, w).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def weights(k, dtype=torch.float32):
    weight = torch.randn(C_OUT, C_IN, k, k) / (k * C_IN**0.5)
    return weight.to(dtype), torch.randn(C_OUT).to(dtype)


def some_cells(b, h, w, g, share=0.6):
    total = b * -(-h // g) * -(-w // g)
    return torch.randperm(total)[: max(1, int(share * total))].sort().values


def check_against_dense(out, x, cells, g, weight, bias, dilation, relu):
    """Compare every chosen cell with the same part of the dense convolution."""
    halo = dilation * (weight.shape[-1] // 2)
    bias = None if bias is None else bias.float()
    dense = F.conv2d(x.float(), weight.float(), bias, padding=halo, dilation=dilation)
    dense = dense.relu() if relu else dense
    rows, cols = -(-x.shape[2] // g), -(-x.shape[3] // g)
    assert out.shape == (len(cells), len(weight), g, g)
    assert out.is_contiguous(memory_format=torch.channels_last)
    for cell, tile in zip(cells.tolist(), out, strict=True):
        image, row, col = cell // (rows * cols), cell // cols % rows, cell % cols
        expected = dense[image, :, row * g : (row + 1) * g, col * g : (col + 1) * g]
        tile = tile[:, : expected.shape[1], : expected.shape[2]].float()
        torch.testing.assert_close(tile, expected, **TOLERANCE[x.dtype])


@pytest.mark.parametrize('form', ['torch', 'triton'])
@pytest.mark.parametrize(('kernel', 'dilation'), [(1, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize(
    ('size', 'g'), [((2, 8, 12), 4), ((2, 7, 13), 4), ((1, 5, 6), 8), ((1, 4, 5), 1)]
)
def test_equals_the_dense_convolution(interpreted, form, kernel, dilation, size, g):
    x, cells = feature_map(*size), some_cells(*size, g)
    weight, bias = weights(kernel)
    out = interpreted('cell_conv', form)(x, cells, g, weight, bias, dilation)
    check_against_dense(out, x, cells, g, weight, bias, dilation, relu=False)


@pytest.mark.parametrize('form', ['torch', 'triton'])
@pytest.mark.parametrize('dtype', list(TOLERANCE), ids=str)
@pytest.mark.parametrize('with_bias', [True, False])
@pytest.mark.parametrize('relu', [True, False])
def test_dtypes_bias_relu(interpreted, form, dtype, with_bias, relu):
    x, cells = feature_map(2, 6, 7, dtype), some_cells(2, 6, 7, 4)
    weight, bias = weights(3, dtype)
    bias = bias if with_bias else None
    out = interpreted('cell_conv', form)(x, cells, 4, weight, bias, relu=relu)
    assert out.dtype == dtype
    check_against_dense(out, x, cells, 4, weight, bias, 1, relu)


@pytest.mark.parametrize('dtype', list(TOLERANCE), ids=str)
def test_triton_equals_torch_beyond_the_edge(interpreted, dtype):
    """Both take the map as zero there, although nobody should rely on it."""
    x, cells = feature_map(2, 5, 9, dtype), torch.arange(2 * 2 * 3)
    weight, bias = weights(3, dtype)
    expected = interpreted('cell_conv', 'torch')(x, cells, 4, weight, bias, 2)
    out = interpreted('cell_conv', 'triton')(x, cells, 4, weight, bias, 2)
    # Both are rounded.
    tolerance = {k: 2 * v for k, v in TOLERANCE[dtype].items()}
    torch.testing.assert_close(out, expected, **tolerance)


@pytest.mark.parametrize('form', ['torch', 'triton'])
def test_no_cells(interpreted, form):
    weight, bias = weights(3)
    none = torch.empty(0, dtype=torch.int64)
    out = interpreted('cell_conv', form)(feature_map(1, 8, 8), none, 4, weight, bias)
    assert out.shape == (0, C_OUT, 4, 4)


@pytest.mark.parametrize('form', ['torch', 'triton'])
def test_weight_in_channels_last(interpreted, form):
    x, cells = feature_map(1, 8, 8), torch.tensor([0, 3])
    weight, bias = weights(3)
    weight = weight.contiguous(memory_format=torch.channels_last)
    out = interpreted('cell_conv', form)(x, cells, 4, weight, bias)
    check_against_dense(out, x, cells, 4, weight, bias, 1, relu=False)


def test_triton_form_refuses_gradients(interpreted):
    weight, bias = weights(3)
    x, cells = feature_map(1, 8, 8).requires_grad_(), torch.tensor([0])
    with pytest.raises(RuntimeError, match='no backward pass'):
        interpreted('cell_conv', 'triton')(x, cells, 4, weight, bias)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(x_BCHW=torch.zeros(C_IN, 8, 8)), 'x_BCHW must have 4 dimensions, got'),
        (dict(x_BCHW=torch.zeros(2, C_IN, 8, 8)), 'x_BCHW must be contiguous in channels_last'),
        (dict(cells_K=torch.zeros(2)), 'cells_K must be int64 of 1 dimension, got torch.float32'),
        (dict(cell_size=0), 'cell_size must be at least 1, got 0'),
        (dict(dilation=0), 'dilation must be at least 1, got 0'),
        (dict(weight=torch.zeros(8, C_IN, 5, 5)), r'with k 1 or 3, got shape \(8, 20, 5, 5\)'),
        (dict(weight=torch.zeros(8, 4, 3, 3)), r'weight must have shape \(8, 20, 3, 3\), got'),
        (dict(bias=torch.zeros(3)), r'bias must have shape \(40,\), got \(3,\)'),
        (dict(bias=torch.zeros(C_OUT).half()), 'one dtype torch.float32, got torch.float16'),
    ],
)
@pytest.mark.parametrize('form', ['torch', 'triton'])
def test_bad_arguments(interpreted, form, change, message):
    weight, bias = weights(3)
    arguments = dict(
        x_BCHW=feature_map(1, 8, 8),
        cells_K=torch.tensor([0]),
        cell_size=4,
        weight=weight,
        bias=bias,
    )
    with pytest.raises(ValueError, match=message):
        interpreted('cell_conv', form)(**(arguments | change))
