"""Gathered top-k execution is one graph: torch.compile, torch.export, CUDA graphs."""

import warnings
from pathlib import Path
from runpy import run_path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmdynsparse.ops import caching

BACKBONES = run_path(str(Path(__file__).with_name('test_all.py')))['BACKBONES']
# Tracing takes its time for every block, and Swin's take the most.
FEWER_BLOCKS = {'SparseSwinTransformer': dict(depths=(1, 2, 2, 1))}
# Its stem apart, V1c is what V1d is.
SLOW = {'SparseResNetV1c'}
NAMES = [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in BACKBONES]
# Everything that is off by default; cells reach beyond the maps.
SHARED = dict(locations={0: (0,), 1: (1,), 2: (0,), 3: (0,)}, follow=(1, 3), cell_size=(5, 3, 2, 1))
WINDOWS = dict(locations={0: (0,), 1: (0,)}, cell_size=(7, 7, 1, 1))
ATTENTION = dict(locations={0: (3,)}, predictor=dict(type='mmdynsparse.AttentionScore'))
OPTIONS = {
    'sparse attention': ('SparseSwinTransformer', dict(SHARED, attention=True)),
    # Without shift the windows are those of the kept cells.
    'cells of the size of windows': ('SparseSwinTransformer', dict(WINDOWS, attention=True)),
    'scores by attention': ('SparseVisionTransformer', ATTENTION),
}
NAMES += OPTIONS
SEG_CONFIG = Path(__file__).parents[2] / 'test_tools' / 'configs' / 'seg.py'


@pytest.fixture(params=NAMES)
def build(request, randomize):
    """Function that builds a backbone with random weights, in eval mode."""

    def function(keep_ratio=0.7):
        name, options = OPTIONS.get(request.param, (request.param, {}))
        cfg = BACKBONES[name] | FEWER_BLOCKS.get(name, {}) | dict(type=f'mmdynsparse.{name}')
        cfg['sparsity'] = dict(cfg.get('sparsity', {}), keep_ratio=keep_ratio) | options
        return randomize(MODELS.build(cfg)).eval()

    return function


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def assert_same(outs, expected):
    for out, ref in zip(outs, expected, strict=True):
        assert (out - ref).abs().max() <= 1e-5


def assert_compiled_equals_eager(compiled, model, x):
    """Outputs and decisions, which a compiled call leaves on the model as well."""
    outs, decisions = compiled(x), model.decisions
    assert_same(outs, model(x))
    assert len(decisions) == len(model.decisions) == len(model.keep_ratios)
    for decision, ref in zip(decisions, model.decisions, strict=True):
        assert decision.hw == ref.hw and decision.ratio == ref.ratio
        assert decision.cell_size == ref.cell_size and decision.count == ref.count
        assert torch.equal(decision.mask, ref.mask)


def test_compiles_to_one_graph(build):
    """One for each size and keep ratio, dense included, whatever the image."""
    model = build()
    backend = CompileCounterWithBackend('eager')
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=False)
    for _ in range(2):
        assert_compiled_equals_eager(compiled, model, torch.randn(2, 3, 64, 96))
    assert backend.frame_count == 1
    assert_compiled_equals_eager(compiled, model, torch.randn(1, 3, 70, 64))
    assert backend.frame_count == 2
    model.set_keep_ratio(1.0)
    assert_compiled_equals_eager(compiled, model, torch.randn(1, 3, 70, 64))
    assert backend.frame_count == 3


@pytest.mark.slow
def test_sizes_may_be_symbolic(build):
    """The second size makes sizes dynamic, unless torch.compile is told otherwise."""
    model = build()
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    for size in ((1, 3, 96, 128), (2, 3, 160, 90)):
        assert_compiled_equals_eager(compiled, model, torch.randn(size))


@pytest.mark.slow
def test_inductor(build):
    model = build()
    compiled = torch.compile(model, fullgraph=True)
    for _ in range(2):
        assert_compiled_equals_eager(compiled, model, torch.randn(2, 3, 64, 96))


@pytest.mark.slow
def test_training_compiles_to_one_graph(build):
    """Outputs and decisions, as a loss and the ratio loss do, reach every parameter."""
    model = build().train()
    model.decider.has_ratio_loss = True
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    with torch.enable_grad():
        outs = compiled(torch.randn(2, 3, 64, 96))
        terms = [*outs, *(decision.mask for decision in model.decisions)]
        sum(term.square().mean() for term in terms).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert [name for name, grad in grads.items() if grad is None] == []
    # A path that happens to be taken nowhere has a gradient of zero, predictors never.
    predictors = [grad.abs().max() for name, grad in grads.items() if 'predictors' in name]
    assert min(predictors, default=1) > 0


@pytest.mark.parametrize('strict', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_exported_program_equals_eager(build, strict, tmp_path):
    model = build()
    # A size that no other test has, so that nothing about it is cached.
    size = (2, 3, 65 + strict, 100)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*were assigned during export')
        exported = torch.export.export(model, (torch.randn(size),), strict=strict)
    assert model.decisions == ()
    torch.export.save(exported, tmp_path / 'model.pt2')
    loaded = torch.export.load(tmp_path / 'model.pt2').module()
    x = torch.randn(size)
    assert_same(loaded(x), model(x))


def test_segmentor_compiles_to_one_graph(randomize):
    cfg = Config.fromfile(SEG_CONFIG)
    init_default_scope('mmseg')
    model = randomize(MODELS.build(cfg.model)).eval()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    x = torch.randn(2, 3, 64, 64)
    assert_same([compiled(x, mode='tensor')], [model(x, mode='tensor')])


class OnDevice(TorchDispatchMode):
    """Refuses operations that read from the host, which no CUDA graph can repeat."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for leaf in tree_leaves((args, kwargs)):
            assert not isinstance(leaf, torch.Tensor) or leaf.is_cuda, func
        return func(*args, **kwargs or {})


@pytest.mark.parametrize('keep_ratio', [0.7, 1.0])
def test_nothing_waits_for_the_device(build, keep_ratio, monkeypatch):
    """On fake CUDA tensors, from which no value can be read."""
    monkeypatch.setattr(caching, '_is_capturing', lambda device: True)
    model = build(keep_ratio)
    state = model.state_dict()
    with FakeTensorMode():
        state = {k: torch.empty(v.shape, dtype=v.dtype, device='cuda') for k, v in state.items()}
        x = torch.empty(2, 3, 72, 96, device='cuda')
        with OnDevice():
            outs = torch.func.functional_call(model, state, (x,))
    assert all(out.is_cuda for out in outs)
