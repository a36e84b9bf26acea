import torch
from torch.profiler import ProfilerActivity, profile

from mmdynsparse.ops import region
from mmdynsparse.ops.regions import PREFIX


def add_one(x):
    with region('gather'):
        x = x + 1
        with region('slow path'):
            return x * 2


def test_ranges_are_seen_while_profiling_and_only_then():
    x = torch.zeros(3)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        add_one(x)
    add_one(x)
    names = [e.name for e in profiler.events() if e.name.startswith(PREFIX)]
    assert names == [PREFIX + 'gather', PREFIX + 'slow path']


def test_nothing_is_recorded_without_a_profiler(monkeypatch):
    monkeypatch.setattr('mmdynsparse.ops.regions.record_function', None)
    assert add_one(torch.zeros(1)).item() == 2


def test_compiled_and_exported_code_has_no_ranges():
    x = torch.zeros(3)
    compiled = torch.compile(add_one, backend='eager', fullgraph=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        assert torch.equal(compiled(x), add_one(x))
    assert sum(e.name.startswith(PREFIX) for e in profiler.events()) == 2  # of the plain call

    class Module(torch.nn.Module):
        def forward(self, x):
            return add_one(x)

    for strict in (True, False):
        graph = torch.export.export(Module(), (x,), strict=strict).graph
        assert {str(n.target) for n in graph.nodes if n.op == 'call_function'} == {
            'aten.add.Tensor',
            'aten.mul.Tensor',
        }
