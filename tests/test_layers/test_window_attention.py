import pytest
import torch

from mmdynsparse.analysis import count_macs
from mmdynsparse.layers import ShiftWindowMSA

HW = [(14, 14), (9, 16), (1, 1), (5, 30)]


@pytest.mark.parametrize('hw', HW)
@pytest.mark.parametrize('shift', [0, 3])
def test_equals_mmseg(hw, shift, randomize):
    swin = pytest.importorskip('mmseg.models.backbones.swin')
    theirs = randomize(swin.ShiftWindowMSA(24, 3, 7, shift_size=shift))
    ours = ShiftWindowMSA(24, 3, 7, shift_size=shift)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, hw[0] * hw[1], 24, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    a, b = theirs(x, hw), ours(y, hw)
    torch.testing.assert_close(b, a, atol=1e-5, rtol=0)
    a.square().sum().backward(), b.square().sum().backward()
    torch.testing.assert_close(y.grad, x.grad, atol=1e-4, rtol=1e-4)
    for (name, p), q in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, atol=1e-3, rtol=1e-3, msg=name)


def test_small_maps_are_shifted_on_demand(randomize):
    attn = randomize(ShiftWindowMSA(8, 2, 7, shift_size=3))
    plain = ShiftWindowMSA(8, 2, 7, shift_size=0)
    plain.load_state_dict(attn.state_dict())
    x = torch.randn(1, 49, 8)
    assert not torch.allclose(attn(x, (7, 7)), plain(x, (7, 7)))
    attn = ShiftWindowMSA(8, 2, 7, shift_size=3, shift_small_maps=False)
    attn.load_state_dict(plain.state_dict())
    assert torch.equal(attn(x, (7, 7)), plain(x, (7, 7)))


def test_projections_never_see_the_padding():
    attn = ShiftWindowMSA(8, 2, 7, shift_size=3)
    rows = []
    for linear in (attn.w_msa.qkv, attn.w_msa.proj):
        linear.register_forward_hook(lambda m, args, out: rows.append(args[0].numel() // 8))
    attn(torch.randn(2, 9 * 8, 8), (9, 8))
    assert rows == [2 * 9 * 8] * 2


@pytest.mark.parametrize('hw', HW)
@pytest.mark.parametrize('shift', [0, 3])
@pytest.mark.parametrize('drop', [0.0, 0.4])
def test_forms_of_the_devices_agree(hw, shift, drop, randomize, monkeypatch):
    """Outputs, gradients and multiply-adds; dropout draws the same weights."""
    attn = randomize(ShiftWindowMSA(24, 3, 7, shift, attn_drop_rate=drop, qk_scale=0.3))
    x = torch.randn(2, hw[0] * hw[1], 24)
    results = []
    for form in ('explicit', 'fused'):
        if form == 'fused':
            monkeypatch.setattr(attn.w_msa, 'attend', attn.w_msa._fused)
        torch.manual_seed(1)
        y = x.clone().requires_grad_()
        out = attn.train()(y, hw)
        grads = torch.autograd.grad(out.square().sum(), (y, *attn.parameters()))
        with torch.no_grad():
            results.append((out, *grads, attn.eval()(x, hw)))
        results[-1] += (torch.tensor(count_macs(attn, x, hw)),)
    for explicit, other in zip(*results, strict=True):
        torch.testing.assert_close(other, explicit, atol=1e-4, rtol=1e-4)
    assert results[0][-1] == results[1][-1]


@pytest.mark.parametrize('hw', HW)
def test_runs_without_values(hw):
    """As on a device from which none can be read."""
    attn = ShiftWindowMSA(8, 2, 7, shift_size=3).to('meta')
    x = torch.empty(2, hw[0] * hw[1], 8, device='meta')
    assert attn(x, hw).shape == x.shape
    kept = torch.empty(1, dtype=torch.int64, device='meta')
    assert attn(x.flatten(0, 1), hw, attn.kept_rows(kept, 2, hw)).shape == (1, 8)
