"""What teacher and student find important."""

import math

import pytest
import torch

from mmdynsparse.engine.importance import importance_loss, importance_target, parse_importance
from mmdynsparse.ops import Decision


def decision(scores):
    return Decision(torch.zeros_like(scores), scores, (1, scores.shape[1]), 0.5)


def test_nothing_to_learn_from_the_same_importance():
    log_t = torch.randn(3, 9).log_softmax(1)
    assert importance_loss([decision(log_t)], log_t.exp()).abs() < 1e-6
    other = torch.randn(3, 9).log_softmax(1)
    loss = importance_loss([decision(other)], log_t.exp())
    expected = (log_t.exp() * (log_t - other)).sum(1).mean() / math.log(9)
    torch.testing.assert_close(loss, expected)


def test_later_decisions_are_about_the_tokens_that_are_left():
    """Mean over decisions; the target is shared out anew, and dropped tokens have no say."""
    target = torch.rand(2, 6).softmax(1)
    first = torch.randn(2, 6).log_softmax(1)
    logits = torch.randn(2, 6, requires_grad=True)
    dropped = torch.tensor([[True, False, False, False, True, False], [False] * 4 + [True] * 2])
    later = logits.masked_fill(dropped, -torch.inf).log_softmax(1)
    loss = importance_loss([decision(first), decision(later)], target)
    terms = [(target * (target.log() - first)).sum(1).mean()]
    rows = []
    for scores, shares, gone in zip(later, target, dropped, strict=True):
        shares = shares[~gone] / shares[~gone].sum()
        rows.append((shares * (shares.log() - scores[~gone])).sum())
    terms.append(torch.stack(rows).mean())
    torch.testing.assert_close(loss, sum(terms) / 2 / math.log(6))
    loss.backward()
    assert logits.grad.isfinite().all() and logits.grad[dropped].abs().max() == 0


def test_entropy_is_that_of_the_pixels_of_a_token():
    logits = torch.zeros(1, 3, 4, 4)
    logits[:, 0, :, :2] = 50  # certain in the left half
    for classes in (3, 1):
        shares = importance_target(None, 'entropy', logits[:, :classes], (2, 2))
        torch.testing.assert_close(shares.sum(1), torch.ones(1))
        assert 0 < shares[0, 0] == shares[0, 2] < 0.01 * shares[0, 1]


def test_importance_of_a_config():
    assert parse_importance(None) is None and parse_importance(dict(weight=0)) is None
    assert parse_importance({}) == (1.0, 'mean')
    assert parse_importance(dict(weight=2, target='entropy')) == (2.0, 'entropy')


def test_as_many_tokens():
    with pytest.raises(ValueError, match='as many tokens as the student, 9, got 6'):
        importance_loss([decision(torch.zeros(2, 9))], torch.ones(2, 6))
