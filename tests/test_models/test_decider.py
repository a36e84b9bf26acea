"""Decisions of necks and heads: modes, keep ratios, the hook that trains and measures them."""

from copy import deepcopy

import pytest
import torch

import mmdynsparse
from mmdynsparse.engine.hooks.sparsity_hook import KeepRateMeter
from mmdynsparse.models import decider as decider_module
from mmdynsparse.models.decider import Decider, deciders, keep_ratios, set_keep_ratio
from mmdynsparse.models.features import Features
from mmdynsparse.models.sparsity import CellSparsity
from mmdynsparse.ops import Decision, cell_grid, keep_all

PREDICTOR = dict(type='mmdynsparse.CellPredictor', reduction=2)


def build(predictor=PREDICTOR, **kwargs):
    torch.manual_seed(0)
    cfg = dict(keep_ratio=0.5, predictor=predictor, **kwargs)
    return Decider(CellSparsity.from_cfg(cfg), 8)


def cells(batch=2):
    torch.manual_seed(0)
    return torch.randn(batch, 12, 8)


HW = (24, 32)  # 3 x 4 cells


def test_training_samples_and_inference_selects():
    """In training the mask carries a gradient; at inference the best half is kept."""
    decider = build()
    decision = decider.predict(cells(), HW, 8)
    assert decision.mask.requires_grad and decision.grid == (3, 4)
    assert decider.plan(decision).form == 'masked'
    decider.eval()
    decision = decider.predict(cells(), HW, 8)
    assert decision.mask.sum(1).tolist() == [6, 6]
    assert decider.plan(decision).kept.numel() == 12
    decider.execution = 'masked'
    assert decider.plan(decider.predict(cells(), HW, 8)).form == 'masked'


def test_execution_is_checked():
    with pytest.raises(ValueError, match=r"one of \('gather', 'masked'\), got 'triton'"):
        build().execution = 'triton'


def test_scores_instead_of_a_predictor():
    """Without a predictor the given scores decide, in training too."""
    decider = build(predictor=None)
    scores = torch.zeros(1, 12, 2)
    scores[0, :6, 0] = 1
    for mode in (True, False):
        decision = decider.train(mode).decide(scores - 2, HW, 8)
        assert decision.mask[0].tolist() == [1] * 6 + [0] * 6


def test_keep_ratio_one_needs_no_look():
    decider = build().eval()
    maps = [torch.zeros(2, 3, *HW)]
    assert not decider.keeps_all() and decider.decide_early(maps, HW) is None
    decider.set_keep_ratio(1.0)
    assert decider.keeps_all()
    assert decider.decide_early(maps, HW).mask.mean() == 1
    assert decider.decide_early(maps, HW).keeps_all
    assert decider.train().decide_early(maps, HW) is None  # the predictor still learns
    with pytest.raises(ValueError, match=r'keep_ratio must be a number in \(0, 1\], got 2'):
        decider.set_keep_ratio(2)


def test_meter_sees_every_forward():
    """Rates are means over forwards."""
    decider = build().eval()
    meter = KeepRateMeter([decider])
    decider([decider.predict(cells(), HW, 8)])
    decider.set_keep_ratio(0.25)
    decider([decider.predict(cells(), HW, 8)])
    assert meter.pop() == [0.375]


def test_warns_once_without_a_ratio_loss(monkeypatch):
    """Nothing would hold the keep rate of a predictor that trains alone."""
    warnings = []
    monkeypatch.setattr(decider_module, 'print_log', lambda text, **kwargs: warnings.append(text))
    for has_ratio_loss, count in ((True, 0), (False, 1)):
        decider = build()
        decider.has_ratio_loss = has_ratio_loss
        for _ in range(2):
            decider.predict(cells(), HW, 8)
        assert len(warnings) == count
    assert 'SparsityHook' in warnings[0]


@pytest.mark.parametrize('selector', ['topk', 'mass', 'value', 'random'])
def test_nothing_to_learn(selector, monkeypatch):
    """Training selects as inference does, keeps everything without a look, and warns of nothing."""
    monkeypatch.setattr(decider_module, 'print_log', lambda *args, **kwargs: 1 / 0)
    decider = build(dict(type='mmdynsparse.MagnitudeScore'), selector=selector)
    seen = decider.cells(torch.randn(2, 8, *HW), 8)
    masks = []
    for mode in (True, False):
        torch.manual_seed(0)
        decision = decider.train(mode).predict(seen, HW, 8)
        assert not decision.mask.requires_grad
        masks.append(decision.mask)
    assert torch.equal(*masks) and not decider.learns
    decider.train().set_keep_ratio(1.0)
    assert decider.keeps_all(learns=True)


def test_predictors_that_do_not_go_with_the_part_or_the_selector():
    with pytest.raises(ValueError, match=r"must not be 'threshold', .* got 'threshold'"):
        build(dict(type='mmdynsparse.MagnitudeScore'), selector='threshold')
    with pytest.raises(ValueError, match=r'AttentionScore in a SparseVisionTransformer .* got'):
        build(dict(type='mmdynsparse.AttentionScore'))


def test_followers_of_scores_without_anything_to_learn_select():
    """The scores of an AttentionScore carry a gradient, their mask does not."""
    source = scored(torch.randn(4, 4))
    source.scores.requires_grad_()
    cfg = CellSparsity.from_cfg(dict(keep_ratio=0.5, predictor='backbone'))
    maps = Features([torch.zeros(1, 1, 32, 32)], [source])
    masks = [Decider(cfg, 8).decide_early(maps, (32, 32)).mask for _ in range(2)]
    assert torch.equal(*masks) and not masks[0].requires_grad


def test_finds_the_sparse_parts_of_a_model():
    model = torch.nn.ModuleDict(dict(neck=torch.nn.Module(), head=torch.nn.Module()))
    model.neck.decider, model.head.decider = build(), Decider(None)
    assert deciders(model) == dict(neck=model.neck.decider)
    assert keep_ratios(model) == [0.5]


def test_keep_ratio_of_a_whole_model():
    model = torch.nn.ModuleDict(dict(neck=torch.nn.Module(), head=torch.nn.Module()))
    model.neck.decider, model.head.decider = build(), build()
    mmdynsparse.set_keep_ratio(model, 1.0)
    assert keep_ratios(model) == [1.0, 1.0]
    set_keep_ratio(model, dict(head=0.3))
    assert keep_ratios(model) == [1.0, 0.3]
    for wrong in (0.0, 1.5, dict(neck=0.5, head=2), dict(neck=0.5, tail=0.5)):
        with pytest.raises(ValueError, match='keep_ratio'):
            set_keep_ratio(model, wrong)
        assert keep_ratios(model) == [1.0, 0.3]
    set_keep_ratio(torch.nn.Linear(1, 1), 1.0)  # it keeps everything already
    with pytest.raises(ValueError, match='needs a model with a sparse part, got a Linear'):
        set_keep_ratio(torch.nn.Linear(1, 1), 0.5)


def test_copies_forget_the_decision():
    decider = build()
    decider.has_ratio_loss = True
    decider([decider.predict(cells(), HW, 8)])
    assert deepcopy(decider).decisions == ()
    assert len(decider.decisions) == 1


def scored(hw, ratio=0.3, seed=0):
    """A decision with random scores, or those of a map (H, W) of logits."""
    if isinstance(hw, torch.Tensor):
        logits = hw[None]
    else:
        torch.manual_seed(seed)
        logits = torch.randn(1, *hw)
    scores = torch.nn.functional.logsigmoid(logits).flatten(1)
    return Decision(torch.zeros_like(scores), scores, tuple(logits.shape[1:]), ratio)


def followed(decisions, hw, cell_size=8, keep_ratio=0.5):
    """What a decider for the cells of a map ``hw`` makes of a backbone's decisions."""
    cfg = dict(keep_ratio=keep_ratio, predictor='backbone', cell_size=cell_size)
    decider = Decider(CellSparsity.from_cfg(cfg), 8).eval()
    maps = Features([torch.zeros(1, 3, *hw)], decisions)
    return decider.decide_early(maps, hw)


def test_follows_the_means_of_its_cells():
    """At stride 16 a cell of 8 positions at stride 4 has 2 x 2 locations, fewer at the edge."""
    logits = torch.randn(5, 7)
    decision = followed([scored(logits)], (18, 27))
    assert decision.grid == (3, 4) and decision.ratio == 0.5
    means = torch.tensor(
        [[logits[y : y + 2, x : x + 2].mean() for x in (0, 2, 4, 6)] for y in (0, 2, 4)]
    )
    torch.testing.assert_close(decision.scores.view(3, 4), torch.nn.functional.logsigmoid(means))
    assert decision.mask.sum() == 6
    assert decision.mask.view(3, 4)[means > means.median()].all()


def test_follows_coarser_decisions_between_their_locations():
    """Cells of 8 within locations of 16 positions, which reach beyond a map of 40 x 24."""
    logits = torch.tensor([[6.0, -6.0], [0.0, 0.0], [-6.0, 6.0]])
    decision = followed([scored(logits)], (40, 24))
    assert decision.grid == (5, 3)
    scores = decision.scores.view(5, 3)
    assert scores[0, 0] > scores[0, 1] > scores[0, 2]
    assert scores[0, 0] > scores[1, 0] > scores[4, 0]
    even = followed([scored(torch.zeros(3, 2))], (40, 24)).scores
    torch.testing.assert_close(even.exp(), torch.full_like(even, 0.5))


@pytest.mark.parametrize('hw', [(128, 128), (90, 120)])
def test_follows_cells_of_any_size(hw):
    """Cells of 7 locations at stride 16 are 28 positions, and the last ones overhang the map."""
    grid = cell_grid(hw, 28)
    centres = 28 * torch.arange(grid[1]) + 14.0
    logits = (centres / 10 - 6).expand(grid)
    stride_16 = tuple(-(-side // 4) for side in hw)
    source = scored(logits)._replace(cell_size=7, hw=stride_16)
    decision = followed([source], hw)
    assert decision.grid == cell_grid(hw, 8)
    probs = decision.scores.exp().view(decision.grid)
    positions = 8 * torch.arange(decision.grid[1]) + 4.0
    inner = (positions > 18) & (positions < centres[-1] - 4)
    expected = positions[inner] / 10 - 6
    assert inner.sum() > 9
    torch.testing.assert_close(probs.logit()[:, inner], expected.expand(len(probs), -1))


def test_follows_locations_that_fit_no_stride():
    logits = torch.zeros(5, 5)
    logits[:, :2] = 5
    decision = followed([scored(logits)], (128, 128), keep_ratio=0.25)
    assert decision.grid == (16, 16)
    assert decision.mask.view(16, 16)[:, :4].all()


def test_follows_the_last_decision_that_is_fine_enough():
    hw, cases = (64, 64), {}
    fine, equal, coarse, coarsest = (scored((n, n)) for n in (16, 8, 4, 2))
    again = scored((16, 16), seed=1)
    cases['last'] = [fine, again], again
    cases['as fine as the cells'] = [fine, equal], equal
    cases['none too coarse'] = [fine, equal, coarse], equal
    cases['finest of the coarse'] = [coarsest, coarse, coarsest], coarse
    cases['last of equals'] = [coarse, scored((4, 4), seed=1)], None
    for name, (decisions, expected) in cases.items():
        source = expected or decisions[-1]
        scores = followed(decisions, hw).scores
        assert torch.equal(scores, followed([source], hw).scores), name
        others = [d for d in decisions if d is not source]
        assert not any(torch.equal(scores, followed([d], hw).scores) for d in others), name


def test_follows_everything_kept():
    """Unless there are scores: those of a predictor that learns to keep."""
    assert followed([keep_all(1, (4, 4), torch.device('cpu'))], (16, 16)).keeps_all
    learning = scored((4, 4), ratio=1.0)
    learning.mask.requires_grad_()
    assert followed([learning], (16, 16)).mask.mean() == 0.5


def test_trains_at_its_own_ratio():
    """The predictor that is followed keeps 10% by its own, and learns from what is kept here."""
    cfg = CellSparsity.from_cfg(dict(keep_ratio=0.5, predictor='backbone'))
    decider = Decider(cfg, 8)
    source = scored(torch.randn(4, 4) - 2.2)
    source.scores.requires_grad_(), source.mask.requires_grad_()
    masks = []
    for _ in range(8):
        maps = Features([torch.zeros(1, 1, 32, 32)], [source])
        decision = decider.decide_early(maps, (32, 32))
        masks.append(decision.mask)
        assert decision.mask.sum() == 8 and decision.mask.requires_grad
    assert not all(torch.equal(masks[0], mask) for mask in masks)
    (masks[0] * torch.randn(16)).sum().backward()
    assert (source.scores.grad != 0).all()
    frozen = Features([torch.zeros(1, 1, 32, 32)], [scored((4, 4))])
    masks = [decider.decide_early(frozen, (32, 32)).mask for _ in range(2)]
    assert torch.equal(*masks)


def test_predictor_is_a_config_or_the_backbones():
    with pytest.raises(ValueError, match="must be a config or 'backbone', got 'neck'"):
        CellSparsity.from_cfg(dict(keep_ratio=0.5, predictor='neck'))
