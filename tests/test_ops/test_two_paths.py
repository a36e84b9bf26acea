import pytest
import torch
from torch import nn

from mmdynsparse.ops import Decision, plan, two_paths

B, N, C = 3, 20, 8


def decision_of(counts):
    """Random decision that keeps the given number of locations in each image."""
    mask = torch.zeros(len(counts), N)
    for row, count in zip(mask, counts, strict=True):
        row[torch.randperm(N)[:count]] = 1
    return Decision(mask, torch.zeros_like(mask), (4, 5), 0.5)


@pytest.fixture
def paths():
    slow = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))
    return slow, nn.Linear(C, C)


def run(x, slow, fast, decision, gather, residual=None):
    residual = x if residual is None else residual
    how = plan(decision, 'gather', learns=not gather)
    assert how.form == ('gather' if gather else 'masked')
    return two_paths(x, residual, slow, fast, how, nn.Identity())


@pytest.mark.parametrize('counts', [(7, 7, 7), (0, 20, 5), (0, 0, 0), (20, 20, 20), (1, 19, 0)])
@pytest.mark.parametrize('with_fast', [True, False])
@pytest.mark.parametrize('own_residual', [True, False])
def test_masked_equals_gathered(paths, counts, with_fast, own_residual):
    slow, fast = paths[0], paths[1] if with_fast else None
    x, decision = torch.randn(B, N, C), decision_of(counts)
    residual = x if own_residual else torch.randn(B, N, C)
    before = residual.clone()
    masked = run(x, slow, fast, decision, False, residual)
    gathered = run(x, slow, fast, decision, True, residual)
    torch.testing.assert_close(masked, gathered, atol=1e-6, rtol=0)
    assert torch.equal(residual, before)


def test_each_location_takes_its_path():
    x, decision = torch.ones(B, N, C), decision_of((3, 0, 20))
    for gather in (False, True):
        out = run(x, lambda t: t * 2, lambda t: t * 5, decision, gather, 10 * x)
        expected = torch.where(decision.mask.bool(), 12.0, 15.0)
        assert torch.equal(out, expected[..., None].expand(B, N, C))


def test_stochastic_depth_drops_the_update_not_the_residual():
    x, decision = torch.ones(B, N, C), decision_of((3, 0, 20))
    how = plan(decision, 'masked', learns=True)
    out = two_paths(x, x, lambda t: t, lambda t: t, how, torch.zeros_like)
    assert torch.equal(out, x)


def test_gathered_computes_each_location_once(paths):
    seen = []

    def slow(x):
        seen.append(len(x))
        return x

    def fast(x):
        seen.append(len(x))
        return x

    run(torch.randn(B, N, C), slow, fast, decision_of((3, 0, 20)), gather=True)
    assert seen == [23, 37]


def test_gradients_of_both_executions_agree(paths):
    slow, fast = paths
    x, decision = torch.randn(B, N, C), decision_of((3, 10, 20))
    grads = []
    for gather in (False, True):
        run(x, slow, fast, decision, gather).square().sum().backward()
        grads.append([p.grad.clone() for p in (*slow.parameters(), *fast.parameters())])
        slow.zero_grad(), fast.zero_grad()
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_mask_gradient_is_the_gain_of_the_slow_path(paths):
    slow, fast = paths
    x, decision = torch.randn(B, N, C), decision_of((3, 10, 20))
    mask = decision.mask.requires_grad_()
    run(x, slow, fast, decision, gather=False).sum().backward()
    torch.testing.assert_close(mask.grad, (slow(x) - fast(x)).sum(-1), atol=1e-5, rtol=1e-5)


def test_gathering_pays_unless_next_to_nothing_is_saved():
    most, fewer = decision_of((20, 19, 17)), decision_of((20, 18, 16))
    assert plan(most, 'gather', learns=False, has_fast_path=False).form == 'masked'
    assert plan(most, 'gather', learns=False).form == 'gather'
    assert plan(fewer, 'gather', learns=False, has_fast_path=False).form == 'gather'
    assert plan(fewer, 'gather', False, has_fast_path=False, break_even=0.8).form == 'masked'


def test_a_plan_says_what_is_executed():
    decision = decision_of((3, 0, 20))
    everything = decision._replace(ratio=1.0)
    assert plan(everything, 'masked', learns=False).form == 'dense'
    assert plan(everything, 'gather', learns=True).form == 'masked'
    for execution in ('gather', 'triton'):
        how = plan(decision, execution, learns=False)
        assert how.form == execution and how.gathers and how.mask is None
        assert len(how.kept) == 23 and len(how.dropped) == 37
    how = plan(decision, 'masked', learns=False)
    assert not how.gathers and torch.equal(how.mask, decision.mask)


def test_a_plan_for_cells_or_for_their_locations():
    mask = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0, 1.0]])
    decision = Decision(mask, torch.zeros(1, 6), (3, 5), 0.5, cell_size=2)
    assert plan(decision, 'gather', False, of_cells=True).kept.tolist() == [0, 5]
    assert plan(decision, 'gather', False).kept.tolist() == [0, 1, 5, 6, 14]
    assert plan(decision, 'masked', False).mask.nonzero()[:, 1].tolist() == [0, 1, 5, 6, 14]


@torch.no_grad()
def test_gathered_leaves_its_input_alone(paths):
    x, residual = torch.randn(B, N, C), torch.randn(B, N, C)
    before = x.clone(), residual.clone()
    run(x, *paths, decision_of((3, 0, 20)), True, residual)
    run(x, lambda t: t, lambda t: t, decision_of((3, 0, 20)), True)
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


@pytest.mark.parametrize('grad', [True, False])
def test_update_and_residual_may_differ_in_dtype(grad):
    x, decision = torch.randn(B, N, C, dtype=torch.bfloat16), decision_of((3, 0, 20))
    with torch.set_grad_enabled(grad):
        out = run(x, lambda t: t.float(), lambda t: t.float(), decision, gather=True)
    assert out.dtype == torch.float32 and torch.equal(out, 2 * x.float())
