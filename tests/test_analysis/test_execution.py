import pytest
import torch
from torch import nn

from mmdynsparse.analysis.execution import CudaGraph, forwards, with_keep_ratio
from mmdynsparse.models import SparseSwinTransformer
from mmdynsparse.models.calls import replaced_methods

X = torch.randn(1, 3, 64, 64)


@pytest.fixture
def swin():
    args = dict(embed_dims=8, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2))
    return SparseSwinTransformer(**args, sparsity=dict(keep_ratio=0.5)).eval()


def test_copies_share_weights_and_have_their_own_ratio(swin):
    copy = with_keep_ratio(swin, 0.25)
    assert copy.keep_ratios == [0.25] and swin.keep_ratios == [0.5]
    assert with_keep_ratio(swin, None).keep_ratios == [0.5]
    for ours, theirs in zip(copy.parameters(), swin.parameters(), strict=True):
        assert ours is theirs
    with torch.no_grad():
        copy(X)
    assert copy.decisions[0].mask.mean() == 0.25
    assert swin.decisions == ()


def test_the_first_sparse_part_gets_the_ratio(swin):
    model = nn.ModuleDict(dict(backbone=swin, other=with_keep_ratio(swin, 0.75)))
    copy = with_keep_ratio(model, 0.25)
    assert copy['backbone'].keep_ratios == [0.25] and copy['other'].keep_ratios == [0.75]


def test_keep_ratio_needs_a_sparse_part():
    with pytest.raises(ValueError, match=r'keep_ratio needs a model with predictors, got 0.5'):
        with_keep_ratio(nn.Linear(1, 1), 0.5)


def test_compiled_forward_runs_until_the_end_of_the_context(swin, monkeypatch):
    compiled = []
    plain = torch.compile

    def count(run, dynamic):
        def called(*args):
            compiled.append(run)
            return run(*args)

        return plain(called, dynamic=dynamic, backend='eager')

    monkeypatch.setattr(torch, 'compile', count)
    replacements = forwards([swin], 'compile')
    with torch.no_grad():
        expected = swin(X)
        with replaced_methods(replacements):
            for ours, theirs in zip(swin(X), expected, strict=True):
                torch.testing.assert_close(ours, theirs)
    assert 'forward' not in swin.__dict__
    assert forwards([swin], 'eager') == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_cuda_graph_follows_its_input(swin):
    swin = swin.cuda()
    graph = CudaGraph(swin.forward)
    with torch.no_grad():
        for x in (X, X + 1):
            for ours, theirs in zip(graph(x.cuda()), swin(x.cuda()), strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
