"""Decisions of necks and heads: modes, keep ratios, the hook that trains and measures them."""

from copy import deepcopy

import pytest
import torch

from mmdynsparse.engine.hooks.sparsity_hook import KeepRateMeter
from mmdynsparse.models import decider as decider_module
from mmdynsparse.models.decider import CellSparsity, Decider

PREDICTOR = dict(type='mmdynsparse.CellPredictor', reduction=2)


def build(predictor=PREDICTOR, **kwargs):
    torch.manual_seed(0)
    cfg = dict(keep_ratio=0.5, predictor=predictor, **kwargs)
    return Decider(CellSparsity.from_cfg(cfg), 8)


def cells(batch=2):
    torch.manual_seed(0)
    return torch.randn(batch, 12, 8)


def test_training_samples_and_inference_selects():
    """In training the mask carries a gradient; at inference the best half is kept."""
    decider = build()
    decision = decider(cells(), (3, 4))
    assert decision.mask.requires_grad
    assert not decider.gathers
    decider.eval()
    decision = decider(cells(), (3, 4))
    assert decision.mask.sum(1).tolist() == [6, 6]
    assert decider.gathers
    assert decision.kept.numel() == 12
    decider.execution = 'masked'
    assert decider(cells(), (3, 4)).kept is None


def test_scores_instead_of_a_predictor():
    """Without a predictor the given scores decide, in training too."""
    decider = build(predictor=None)
    scores = torch.zeros(1, 12, 2)
    scores[0, :6, 0] = 1
    for mode in (True, False):
        decision = decider.train(mode)(scores - 2, (3, 4))
        assert decision.mask[0].tolist() == [1] * 6 + [0] * 6


def test_keep_ratio_one_needs_no_look():
    decider = build().eval()
    assert not decider.keeps_all
    decider.set_keep_ratio(1.0)
    assert decider.keeps_all
    assert decider.keep_all(torch.zeros(2, 3, 4, 4), (3, 4)).mask.mean() == 1
    assert decider.decisions[0].keeps_all
    decider.train()
    assert not decider.keeps_all  # the predictor still learns
    with pytest.raises(ValueError, match=r'keep_ratio must be a number in \(0, 1\], got 2'):
        decider.set_keep_ratio(2)


@pytest.mark.parametrize('predictor', [PREDICTOR, None], ids=['predictor', 'scores'])
def test_meter_sees_every_call(predictor):
    """Rates are means over calls, with and without parameters."""
    decider = build(predictor).eval()
    meter = KeepRateMeter([decider])
    x = cells() if predictor else -cells()[..., :2].abs()
    decider(x, (3, 4))
    decider.set_keep_ratio(0.25)
    decider(x, (3, 4))
    assert meter.pop() == [0.375]


def test_warns_once_without_a_ratio_loss(monkeypatch):
    """Nothing would hold the keep rate of a predictor that trains alone."""
    warnings = []
    monkeypatch.setattr(decider_module, 'print_log', lambda text, **kwargs: warnings.append(text))
    for has_ratio_loss, count in ((True, 0), (False, 1)):
        decider = build()
        decider.has_ratio_loss = has_ratio_loss
        for _ in range(2):
            decider(cells(), (3, 4))
        assert len(warnings) == count
    assert 'SparsityHook' in warnings[0]


def test_copies_forget_the_decision():
    decider = build()
    decider.has_ratio_loss = True
    decider(cells(), (3, 4))
    assert deepcopy(decider).decisions == []
    assert len(decider.decisions) == 1
