import pytest
import torch
from torch import nn

from mmdynsparse.layers import FFN, Linear, linear_act


@pytest.mark.parametrize('num_fcs', [2, 3])
@pytest.mark.parametrize('act', ['GELU', 'ReLU'])
@torch.no_grad()
def test_ffn_equals_that_of_mmcv(num_fcs, act):
    from mmcv.cnn.bricks import transformer

    args = dict(num_fcs=num_fcs, act_cfg=dict(type=act), ffn_drop=0.1)
    original = transformer.FFN(12, 20, add_identity=False, **args).eval()
    ours = FFN(12, 20, **args).eval()
    ours.load_state_dict(original.state_dict())
    x = torch.randn(2, 7, 12)
    torch.testing.assert_close(ours(x), original(x), atol=1e-6, rtol=1e-5)


def test_ffn_needs_two_layers():
    with pytest.raises(ValueError, match='num_fcs must be at least 2, got 1'):
        FFN(12, 20, dict(type='GELU'), num_fcs=1)


@pytest.mark.parametrize('act', [nn.GELU(), nn.GELU(approximate='tanh'), nn.SiLU()])
@torch.no_grad()
def test_activation_is_the_one_given(act):
    fc, x = Linear(12, 8), torch.randn(7, 12)
    plain = nn.functional.linear(x, fc.weight, fc.bias)
    torch.testing.assert_close(linear_act(x, fc, act), act(plain), atol=1e-6, rtol=1e-5)
