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
    tokens, slots = 2 * 9 * 8, 2 * 14 * 14
    macs = count_macs(lambda: attn(torch.randn(2, 9 * 8, 8), (9, 8)))
    assert macs == tokens * 4 * 8 * 8 + slots * 2 * 49 * 8


@pytest.mark.parametrize('name', ['qkv', 'proj'])
@torch.no_grad()
def test_hooks_on_projections_are_not_skipped(name, randomize):
    """In dense and in sparse attention, and for the padding: (9, 8) is not whole windows."""
    swin = pytest.importorskip('mmseg.models.backbones.swin')
    theirs = randomize(swin.ShiftWindowMSA(24, 3, 7, shift_size=3))
    ours = ShiftWindowMSA(24, 3, 7, shift_size=3)
    ours.load_state_dict(theirs.state_dict())
    for attn in (theirs, ours):
        layer = getattr(attn.w_msa, name)
        layer.register_forward_hook(lambda module, args, out: 2 * out)
    x = torch.randn(1, 72, 24)
    expected = theirs(x, (9, 8))
    torch.testing.assert_close(ours(x, (9, 8)), expected, atol=1e-5, rtol=0)
    kept = torch.tensor([3, 17, 18, 60])
    rows = ours.kept_rows(kept, 1, (9, 8))
    assert rows.queries is not None
    tokens = x[0] if rows.tokens is None else x[0].index_select(0, rows.tokens)
    actual = ours(tokens, (9, 8), rows)
    torch.testing.assert_close(actual, expected[0, kept], atol=1e-5, rtol=0)


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
