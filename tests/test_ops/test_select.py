import pytest
import torch
import torch.nn.functional as F

from mmdynsparse.ops import (
    SELECTORS,
    Decision,
    keep_all,
    kept_and_dropped,
    resize_scores,
    sample_decision,
    select_decision,
)
from mmdynsparse.ops.select import mass_mask, sampled_mask, value_mask


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
    assert sorted(torch.cat(kept_and_dropped(decision)).tolist()) == list(range(30))


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


def test_sampled_is_fixed_and_another_in_each_place():
    scores = log_probs(2, 50)
    masks = [select_decision(scores, (5, 10), 0.4, 'sampled', place=i).mask for i in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert all(mask.sum(1).tolist() == [20, 20] for mask in masks)


def test_sampled_keeps_equals_evenly():
    equal = torch.full((1, 400, 2), 0.5).log()
    mask = select_decision(equal, (20, 20), 0.25, 'sampled').mask.view(20, 20)
    assert all(3 <= kept <= 7 for kept in (*mask.sum(0).tolist(), *mask.sum(1).tolist()))


def test_sampled_keeps_as_often_as_exact_samples():
    torch.manual_seed(0)
    scores = log_probs(1, 2000)
    kept = sum(sample_decision(scores, (40, 50), 0.4, exact=True).mask for _ in range(200)) / 200
    fixed = sum(sampled_mask(scores[..., 0], 0.4, place) for place in range(200)) / 200
    assert (kept - fixed).abs().mean() < 0.05


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
    kept, dropped = kept_and_dropped(decision)
    assert torch.equal(kept, mask.nonzero().squeeze(1))
    assert torch.equal(dropped, (~mask).nonzero().squeeze(1))


@pytest.mark.parametrize('mask', [[[0.0, 0.0]], [[1.0, 1.0]], [[1.0, 0.0]]])
def test_positions_of_nothing_and_everything(mask):
    decision = Decision(torch.tensor(mask), torch.zeros(1, 2), (1, 2), 0.5)
    static = kept_and_dropped(decision._replace(count=int(sum(mask[0]))))
    for counted, expected in zip(kept_and_dropped(decision), static, strict=True):
        assert torch.equal(counted, expected)


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
    decision = keep_all(2, (2, 3), torch.device('cpu'))
    assert decision.keeps_all and decision.mask.shape == (2, 6) and decision.mask.min() == 1
    decision = keep_all(2, (9, 15), torch.device('cpu'), cell_size=4)
    assert decision.grid == (3, 4) and decision.mask.shape == (2, 12) and decision.count == 12


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


def brute_force_mass(probs, share):
    """The fewest places that hold the share of the sum, tried from the most probable on."""
    order = probs.argsort(descending=True)
    for count in range(len(probs) + 1):
        if probs[order[:count]].sum() >= share * probs.sum() - 1e-6:
            return set(order[:count].tolist())


@pytest.mark.parametrize('ratios', [(1.0, 0.7), (0.7, 0.49), (0.5, 0.5)])
def test_mass_among_is_a_share_of_all(ratios):
    """Of what the decision before kept, ``ratio / among_ratio`` of the mass: equal probabilities
    keep as many as a fixed budget."""
    before, ratio = ratios
    scores = log_probs(3, 60)
    among = select_decision(log_probs(3, 60), (6, 10), before).mask
    options = dict(selector='mass', among_BN=among, among_ratio=before)
    mask = select_decision(scores, (6, 10), ratio, **options).mask
    for image in range(3):
        probs = scores[image, :, 0].exp() * among[image]
        expected = brute_force_mass(probs, ratio / before)
        assert set(mask[image].nonzero()[:, 0].tolist()) == expected
    equal = torch.full((3, 60, 2), 0.5).log()
    kept = select_decision(equal, (6, 10), ratio, **options).mask.sum(1)
    fixed = select_decision(equal, (6, 10), ratio, among_BN=among).mask.sum(1)
    assert (kept - fixed).abs().max() <= 1


@pytest.mark.parametrize('selector', SELECTORS)
def test_only_some_may_be_kept(selector):
    among = select_decision(log_probs(2, 50), (5, 10), 0.6).mask
    scores = log_probs(2, 50).requires_grad_()
    for decision in (
        select_decision(scores, (5, 10), 0.3, selector, among_BN=among),
        sample_decision(scores, (5, 10), 0.3, selector, among_BN=among),
    ):
        assert decision.mask.max() == 1 and (decision.mask * (1 - among)).max() == 0


def test_exact_sampling_of_everything_teaches_nothing():
    scores = log_probs(2, 50).requires_grad_()
    decision = sample_decision(scores, (5, 10), 1.0, exact=True)
    assert decision.mask.eq(1).all() and decision.ratio == 1
    decision.mask.sum().backward()
    assert scores.grad.eq(0).all()


def test_exact_sampling_learns_however_sure_the_scores_are():
    """P(keep) of 0.9999 everywhere, whose own gradient would be nearly nothing."""
    logits = (torch.randn(4, 50) + 9).requires_grad_()
    log_probs_BN2 = F.logsigmoid(torch.stack((logits, -logits), -1))
    sample_decision(log_probs_BN2, (5, 10), 0.3, exact=True).mask.sum().backward()
    assert logits.grad.amax(1).min() > 0.05


@pytest.mark.parametrize('ratio', [0.01, 0.3, 0.6])
def test_exact_sampling_among_some(ratio):
    """As many of them as of all, also where no others are left."""
    among = select_decision(log_probs(2, 50), (5, 10), 0.6).mask
    scores = log_probs(2, 50).requires_grad_()
    mask = sample_decision(scores, (5, 10), ratio, exact=True, among_BN=among).mask
    assert (mask.sum(1) == int(50 * ratio)).all() and (mask * (1 - among)).max() == 0
    mask.sum().backward()
    assert scores.grad.isfinite().all()


def test_a_ratio_loss_has_no_say_in_exact_sampling():
    """Rounding down to 16 of 50 is not what the predictor did."""
    decision = sample_decision(log_probs(), (5, 10), 0.33, exact=True)
    assert (decision.mask.sum(1) == 16).all()
    assert (decision.mask.mean(1) - decision.ratio).abs().max() < 1e-6


def brute_force_value(probs, share):
    """Places of at least ``times`` the mean, or else the best one."""
    times = 1 / share - 1
    kept = {i for i, p in enumerate(probs.tolist()) if p >= times * probs.mean().item()}
    return kept or {probs.argmax().item()}


BRUTE_FORCE = {mass_mask: brute_force_mass, value_mask: brute_force_value}


@pytest.mark.parametrize('mask_of', BRUTE_FORCE)
@pytest.mark.parametrize('share', [0.05, 0.3, 0.5, 0.9, 0.99])
def test_adaptive_selectors(mask_of, share):
    """They do what brute force does, whatever the order, and keep more for a larger share."""
    scores = (3 * torch.randn(4, 40)).log_softmax(-1)
    mask = mask_of(scores, share)
    for row, one in zip(scores.exp().double(), mask, strict=True):
        assert set(one.nonzero()[:, 0].tolist()) == BRUTE_FORCE[mask_of](row, share)
    order = torch.randperm(40)
    assert torch.equal(mask_of(scores[:, order], share), mask[:, order])
    assert (mask_of(scores, 0.9 * share) <= mask).all()
    assert torch.equal(mask_of(scores - 2, share), mask)  # shares of the sum, whatever it is


@pytest.mark.parametrize('mask_of', BRUTE_FORCE)
def test_adaptive_selectors_keep_within_limits(mask_of):
    """Shares of all places, ties by position, at least one place and none that may not be kept."""
    scores = torch.tensor([[0.7, 0.1, 0.1, 0.1] + 6 * [1e-9]]).log()
    kept = [mask_of(scores, share, **limits).nonzero()[:, 1].tolist() for share, limits in (
        (0.01, {}), (0.01, dict(least=0.21)), (0.999, dict(most=0.29)), (0.01, dict(most=0.05)),
        (0.5, dict(least=0.5, most=0.5)),
    )]  # fmt: skip
    assert kept == [[0], [0, 1, 2], [0, 1], [0], [0, 1, 2, 3, 4]]
    scores[:, 1:] = -torch.inf
    assert mask_of(scores, 0.5, least=0.5).nonzero()[:, 1].tolist() == [0]
    assert mask_of(torch.full((1, 3), -torch.inf), 0.5).sum() == 0
    equal = torch.full((1, 30), 1 / 30).log()
    assert mask_of(equal, 0.5).sum() == (15 if mask_of is mass_mask else 30)


def test_selectors_with_arguments():
    scores = log_probs()
    selector = dict(type='value', least=0.4, most=0.5)
    masks = [select_decision(scores, (5, 10), r, selector).mask for r in (0.1, 0.9)]
    assert [mask.sum(1).tolist() for mask in masks] == [[20, 20], [25, 25]]
    assert selector['type'] == 'value'
    assert torch.equal(masks[0], select_decision(scores, (5, 10), 0.4).mask)
