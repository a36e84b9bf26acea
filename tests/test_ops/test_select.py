import pytest
import torch
import torch.nn.functional as F

from mmdynsparse.ops import (
    SELECTORS,
    Decision,
    keep_all,
    resize_scores,
    sample_decision,
    select_decision,
    with_positions,
)


def log_probs(b=2, n=50):
    return torch.randn(b, n, 2).log_softmax(-1)


@pytest.mark.parametrize('ratio, kept', [(0.7, 35), (0.5, 25), (0.01, 0), (0.999, 49)])
def test_topk_keeps_the_best_scored(ratio, kept):
    scores = log_probs()
    decision = select_decision(scores, (5, 10), ratio)
    best = scores[..., 0].argsort(dim=1, descending=True)[:, :kept]
    expected = torch.zeros(2, 50).scatter_(1, best, 1)
    assert torch.equal(decision.mask, expected)
    assert decision.ratio == ratio and decision.hw == (5, 10)


def test_topk_keeps_a_fixed_number_of_equal_scores():
    decision = select_decision(torch.zeros(3, 10, 2), (2, 5), 0.5)
    assert decision.mask.sum(1).tolist() == [5, 5, 5]
    assert sorted(torch.cat((decision.kept, decision.dropped)).tolist()) == list(range(30))


def test_threshold_follows_the_probability():
    probs = torch.tensor([[0.9, 0.4, 0.6, 0.1]])
    scores = torch.stack((probs, 1 - probs), -1).log()
    assert select_decision(scores, (2, 2), 0.5, 'threshold').mask.tolist() == [[1, 0, 1, 0]]


def test_mass_keeps_the_fewest_that_hold_the_share():
    probs = torch.tensor([[0.1, 0.5, 0.3, 0.1], [0.25, 0.25, 0.25, 0.25]])
    scores = torch.stack((probs, 1 - probs), -1).log()
    mask = select_decision(scores, (2, 2), 0.7, 'mass').mask
    assert mask[0].tolist() == [0, 1, 1, 0]
    assert mask[1].sum() == 3


def test_random_keeps_a_fixed_number_whatever_the_scores():
    scores = log_probs(2, 1000)
    masks = [select_decision(scores, (10, 100), 0.3, 'random').mask for _ in range(2)]
    assert all(mask.sum(1).tolist() == [300, 300] for mask in masks)
    # Two independent draws agree in 58% of the places, give or take 2%.
    assert (masks[0] == masks[1]).float().mean() < 0.7
    best = select_decision(scores, (10, 100), 0.3).mask
    assert (masks[0] * best).sum() / 600 == pytest.approx(0.3, abs=0.1)


def test_random_leaves_out_what_cannot_be_kept():
    scores = torch.zeros(1, 10, 2)
    scores[0, :6] = -torch.inf
    mask = select_decision(scores, (2, 5), 0.3, 'random').mask
    assert mask[0, :6].sum() == 0 and mask.sum() == 3


def test_random_sampling_teaches_nothing_but_reaches_every_parameter():
    logits = torch.randn(4, 30, 2, requires_grad=True)
    decision = sample_decision(logits.log_softmax(-1), (5, 6), 0.5, selector='random')
    assert decision.mask.sum(1).tolist() == [15] * 4
    decision.mask.square().sum().backward()
    assert logits.grad.abs().max() == 0


@pytest.mark.parametrize('selector', SELECTORS)
def test_positions_are_the_sorted_mask(selector):
    decision = select_decision(log_probs(3, 40), (5, 8), 0.6, selector)
    mask = decision.mask.flatten().bool()
    assert torch.equal(decision.kept, mask.nonzero().squeeze(1))
    assert torch.equal(decision.dropped, (~mask).nonzero().squeeze(1))


def test_masked_execution_needs_no_positions():
    decision = select_decision(log_probs(), (5, 10), 0.5, gather=False)
    assert decision.kept is None and decision.dropped is None


@pytest.mark.parametrize('mask', [[[0.0, 0.0]], [[1.0, 1.0]], [[1.0, 0.0]]])
def test_positions_of_nothing_and_everything(mask):
    decision = Decision(torch.tensor(mask), torch.zeros(1, 2), (1, 2), 0.5)
    counted, static = with_positions(decision), with_positions(decision, int(sum(mask[0])))
    assert torch.equal(counted.kept, static.kept)
    assert torch.equal(counted.dropped, static.dropped)


@pytest.mark.parametrize('selector', SELECTORS)
def test_nan_scores_are_refused(selector):
    scores = log_probs()
    scores[1, 3] = float('nan')
    with pytest.raises(ValueError, match='NaN'):
        select_decision(scores, (5, 10), 0.5, selector)


def test_sampled_mask_is_hard_and_has_a_gradient():
    logits = torch.randn(4, 30, 2, requires_grad=True)
    mask = sample_decision(logits.log_softmax(-1), (5, 6), 0.5).mask
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    (mask * torch.randn_like(mask)).sum().backward()
    assert logits.grad.abs().min() > 0


def test_sampling_follows_the_probability():
    scores = torch.tensor([0.8, 0.2]).log().expand(1, 20000, 2)
    assert sample_decision(scores, (100, 200), 0.5).mask.mean().item() == pytest.approx(
        0.8, abs=0.01
    )


def test_ratio_one_samples_everything_with_a_gradient():
    logits = torch.randn(2, 30, 2, requires_grad=True)
    mask = sample_decision(logits.log_softmax(-1), (5, 6), 1.0).mask
    assert torch.equal(mask, torch.ones(2, 30))
    mask.sum().backward()
    assert logits.grad.abs().min() > 0


def test_sampling_is_float32_for_half_scores():
    decision = sample_decision(log_probs().bfloat16(), (5, 10), 0.5)
    assert decision.mask.dtype == decision.scores.dtype == torch.float32


def test_keep_all():
    decision = keep_all(torch.zeros(2, 6, 4), (2, 3))
    assert decision.keeps_all and decision.mask.shape == (2, 6) and decision.mask.min() == 1


def test_temperature_changes_the_gradient_alone():
    logits = torch.randn(4, 30, 2, requires_grad=True)
    masks, grads = [], []
    for temperature in (1.0, 0.5, 4.0):
        torch.manual_seed(1)
        mask = sample_decision(logits.log_softmax(-1), (5, 6), 0.5, temperature).mask
        masks.append(mask.detach())
        grads.append(torch.autograd.grad(mask.sum(), logits)[0])
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])
    assert not torch.allclose(grads[0], grads[1]) and not torch.allclose(grads[0], grads[2])


def test_resized_scores_of_the_same_size_are_the_scores():
    log_probs_BN2 = log_probs()
    resized = resize_scores(log_probs_BN2[..., 0], (5, 10), (5, 10))
    torch.testing.assert_close(resized, log_probs_BN2, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('new_hw, size', [((2, 3), 1), ((8, 12), 1), ((4, 6), 2), ((9, 7), 2)])
def test_resized_scores_are_log_probabilities_of_the_same_places(new_hw, size):
    """The left half is kept, the right half is not."""
    probs = torch.tensor([0.9, 0.9, 0.9, 0.1, 0.1, 0.1]).expand(1, 4, 6)
    resized = resize_scores(probs.flatten(1).log(), (4, 6), new_hw, size)
    grid = -(-new_hw[0] // size), -(-new_hw[1] // size)
    assert resized.shape == (1, grid[0] * grid[1], 2)
    torch.testing.assert_close(resized.exp().sum(-1), torch.ones(1, grid[0] * grid[1]))
    kept = resized[..., 0].exp().view(grid)
    torch.testing.assert_close(kept[:, 0], torch.full((grid[0],), 0.9), atol=1e-4, rtol=0)
    torch.testing.assert_close(kept[:, -1], torch.full((grid[0],), 0.1), atol=1e-4, rtol=0)


def test_resized_scores_are_finite_whatever_the_scores():
    scores = torch.tensor([[0.0, -torch.inf, -1e-12, -200.0, -0.5, -1.0]], requires_grad=True)
    resized = resize_scores(scores, (2, 3), (4, 6))
    resized[..., 1].sum().backward()
    assert resized.isfinite().all() and scores.grad.isfinite().all()
    assert scores.grad[0, 4:].abs().min() > 0


def test_exact_sampling_keeps_the_budget_whatever_the_probabilities():
    logits = (torch.randn(4, 50) - 3).requires_grad_()
    log_probs_BN2 = F.logsigmoid(torch.stack((logits, -logits), -1))
    masks = [sample_decision(log_probs_BN2, (5, 10), 0.3, exact=True).mask for _ in range(200)]
    assert all(mask.sum(1).tolist() == [15] * 4 for mask in masks)
    rates = torch.stack(masks).mean(0).detach()
    assert torch.corrcoef(torch.stack((rates.flatten(), logits.detach().flatten())))[0, 1] > 0.7
    masks[0].sum().backward()
    assert (logits.grad > 0).all()


@pytest.mark.parametrize('options', [{}, dict(exact=True), dict(selector='random')])
def test_extra_locations_are_kept_and_teach_nothing(options):
    logits = torch.randn(2, 6000, 2, requires_grad=True)
    scores = logits.log_softmax(-1)
    kept = sample_decision(scores, (60, 100), 0.4, **options).mask.mean().item()
    decision = sample_decision(scores, (60, 100), 0.4, extra=0.75, **options)
    assert decision.ratio == pytest.approx(0.85)
    assert decision.mask.mean().item() == pytest.approx(1 - 0.25 * (1 - kept), abs=0.02)
    (grad,) = torch.autograd.grad(decision.mask.sum(), logits)
    share = grad.ne(0).any(-1).float().mean().item()
    assert share == pytest.approx(0 if options.get('selector') else 0.25, abs=0.02)


def test_all_locations_are_extra():
    logits = torch.randn(2, 30, 2, requires_grad=True)
    decision = sample_decision(logits.log_softmax(-1), (5, 6), 0.4, extra=1.0)
    assert decision.ratio == 1 and torch.equal(decision.mask, torch.ones(2, 30))
    (grad,) = torch.autograd.grad(decision.mask.sum(), logits)
    assert not grad.any()


def test_a_ratio_loss_has_no_say_in_exact_sampling():
    """Rounding down to 16 of 50 is not what the predictor did."""
    decision = sample_decision(log_probs(), (5, 10), 0.33, exact=True)
    assert (decision.mask.sum(1) == 16).all()
    assert (decision.mask.mean(1) - decision.ratio).abs().max() < 1e-6
