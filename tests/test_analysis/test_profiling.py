import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmdynsparse.analysis.profiling import (
    PARTS,
    WHOLE,
    _add_times,
    _kernel_time,
    breakdown,
    model_breakdown,
    peak_memory,
)
from mmdynsparse.engine.hooks.sparsity_hook import recorded_keep_rates
from mmdynsparse.models import SparseConvNeXt, SparseVisionTransformer
from mmdynsparse.models.decider import CellSparsity, Decider
from mmdynsparse.ops import region
from mmdynsparse.ops.regions import PREFIX

CPU = torch.device('cpu')
MB = 2**18  # float32 values of a MiB


class Naps(nn.Module):
    """Spends known times in its regions, one of them within another."""

    def __init__(self):
        super().__init__()
        self.ffn = nn.Identity()
        self.block = nn.Module()
        self.block.attn = Nap(0.004)

    def forward(self, x):
        time.sleep(0.002)
        with region('slow path'):
            time.sleep(0.008)
            with region('gather'):
                time.sleep(0.016)
            with region('slow path'):
                time.sleep(0.001)
        self.block.attn(x)
        return x


class Nap(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return x


def test_breakdown_counts_nested_regions_once_and_sums_to_the_whole():
    model = Naps()
    elapsed = []

    def call():
        start = time.perf_counter()
        model(torch.zeros(1))
        elapsed.append(1e3 * (time.perf_counter() - start))

    times = breakdown(model, call, CPU, runs=2)
    assert set(times) == {*PARTS, 'whole'}
    expected = {'rest': 2, 'slow path': 9, 'gather': 16, 'attention': 4}
    for part in PARTS:
        assert times[part] >= expected[part] if part in expected else times[part] == 0, part
    assert times['whole'] == pytest.approx(sum(times[part] for part in PARTS))
    # Counting the inner region twice would add 16 ms.
    assert times['whole'] == pytest.approx(sum(elapsed[1:]) / 2, abs=5)
    assert 'forward' not in model.block.attn.__dict__


@pytest.mark.parametrize('keep_ratio', [1.0, 0.5])
@pytest.mark.parametrize(
    ('family', 'arguments', 'parts'),
    [
        (
            SparseConvNeXt,
            dict(arch=dict(depths=(1, 1, 2, 1), channels=(8, 16, 24, 32))),
            {'slow path', 'rest'},
        ),
        (
            SparseVisionTransformer,
            dict(embed_dims=16, num_layers=4, num_heads=2),
            {'slow path', 'attention', 'rest'},
        ),
    ],
)
def test_parts_of_the_families(family, arguments, parts, keep_ratio):
    model = family(**arguments, sparsity=dict(keep_ratio=keep_ratio)).eval()
    x = torch.randn(1, 3, 96, 96)
    times = breakdown(model, lambda: model(x), CPU, runs=1)
    if keep_ratio < 1:
        parts = parts | {'predictor', 'selection', 'gather', 'scatter'}
    assert {part for part in PARTS if times[part] > 0} - {'fast path'} == parts
    assert (times['fast path'] > 0) == (keep_ratio < 1 and family is SparseConvNeXt)


def test_breakdown_of_a_model_has_what_ran_with_the_whole_of_a_head():
    class Head(Nap):
        def predict(self, x):
            time.sleep(0.008)
            return self(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.data_preprocessor = Nap(0.002)
            self.backbone = Naps()
            self.rpn_head = Head(0.016)
            self.auxiliary_head = Head(0.1)

        def test_step(self):
            return self.rpn_head.predict(self.backbone(self.data_preprocessor(torch.zeros(1))))

    model = Model()
    times = model_breakdown(model, model.test_step, CPU, runs=2)
    assert list(times) == ['backbone', 'rpn_head', 'rest', 'whole']
    for part, expected in dict(backbone=31, rpn_head=24, rest=2).items():
        assert times[part] >= expected, part
    assert times['whole'] == pytest.approx(sum(times[part] for part in list(times)[:-1]))
    assert 'predict' not in model.rpn_head.__dict__ and 'forward' not in model.backbone.__dict__


def test_kernels_belong_to_the_innermost_range_that_launched_them():
    def event(name, *children, **kernels):
        launched = [SimpleNamespace(name=key, duration=value) for key, value in kernels.items()]
        return SimpleNamespace(name=name, cpu_children=children, kernels=launched)

    gather = PREFIX + 'gather'
    inner = event(gather, event('aten::index_select', index=8), **{gather: 100})
    slow = event(PREFIX + 'slow path', event('aten::addmm', gemm=16, copy=1), inner)
    totals = Counter()
    whole = event(WHOLE, slow, event('aten::add', add=2))
    _add_times(whole, 'rest', totals, PREFIX, _kernel_time)
    assert totals == {'slow path': 17, 'gather': 8, 'rest': 2}


def test_keep_rates_are_the_mean_over_all_calls():
    def decider():
        return Decider(CellSparsity(0.5, predictor='backbone'), 0).eval()

    model = nn.ModuleDict(dict(neck=decider(), idle=decider(), head=decider()))
    scores = torch.rand(1, 8, 2)
    with recorded_keep_rates(model) as rates:
        for ratios in ((0.5, 1.0), (0.25, 0.5)):
            for name, ratio in zip(('neck', 'head'), ratios, strict=True):
                model[name].set_keep_ratio(ratio)
                model[name]([model[name].decide(scores, (2, 4))])
    assert rates == [0.375, 0.75]
    assert not any(part._forward_hooks for part in model.values())


def test_peak_memory():
    def call():
        a = torch.zeros(4 * MB)
        b = torch.zeros(MB)
        del a
        return b, torch.zeros(2 * MB)

    assert peak_memory(call, CPU) == pytest.approx(5, abs=0.01)
    weight = torch.zeros(512, 512)
    assert peak_memory(lambda: weight @ weight, CPU) == pytest.approx(1, abs=0.01)
