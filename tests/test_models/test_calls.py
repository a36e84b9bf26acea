from copy import deepcopy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from mmdynsparse.models.calls import CallRecorder, around_calls, replaced_methods


class Net(nn.Module):
    """Calls a module's own ``forward``, as the heads of mmseg do."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Conv2d(3, 2, 1)
        self.head = nn.Conv2d(2, 2, 1)

    def forward(self, x):
        return self.head.forward(self.backbone(x))


@pytest.fixture
def net():
    return Net()


X = torch.randn(1, 3, 4, 4)


def replaced(model):
    return [name for name, m in model.named_modules() if {'forward', 'predict'} & set(vars(m))]


def test_methods_are_replaced_until_the_context_ends(net):
    net.head.forward = marked = lambda x: x + 1
    net.backbone.predict = None  # what is there, even that
    with pytest.raises(ZeroDivisionError), replaced_methods({net.backbone: abs, net.head: abs}):
        assert torch.equal(net(X), X.abs())
        raise ZeroDivisionError
    assert replaced(net) == ['backbone', 'head'] and net.head.forward is marked
    with replaced_methods({net.backbone: abs, net.head: abs}, 'predict'):
        assert net.head.predict(-1) == net.backbone.predict(-1) == 1
    assert net.backbone.predict is None and not hasattr(net.head, 'predict')


def test_calls_are_surrounded_whichever_way_they_are_made(net):
    net.head.forward = marked = lambda x: x + 1
    calls = []

    class Note:
        def __enter__(self):
            calls.append('in')

        def __exit__(self, *_):
            calls.append('out')

    with around_calls(net, {'backbone': Note, 'head': Note}):
        torch.testing.assert_close(net(X), net.backbone(X) + 1)
    assert calls == ['in', 'out'] * 3
    assert replaced(net) == ['head'] and net.head.forward is marked


def test_calls_are_recorded_until_the_stop(net):
    recorder = CallRecorder({'backbone': net.backbone, 'head': net.head})
    net(X)
    assert not replaced(net)
    recorder.start()
    out = net(X)
    backbone, head = recorder.stop()
    assert (backbone.name, head.name) == ('backbone', 'head')
    assert backbone.args[0] is X and head.args[0] is backbone.out and head.out is out
    assert not replaced(net) and not recorder.stop()
    recorder.start()
    net(X)
    recorder.start()  # what a call that failed has left is forgotten
    assert not recorder.stop() and not replaced(net)


def test_a_function_that_fails_leaves_nothing(net):
    recorder = CallRecorder({'backbone': net.backbone})
    with pytest.raises(RuntimeError):
        recorder.record(lambda: net(X[:, :2]))
    assert not replaced(net) and not recorder.stop()


def test_every_call_and_every_name_is_recorded(net):
    recorder = CallRecorder({'backbone': net.backbone, 'alias': net.backbone})
    outs = []
    calls = recorder.record(lambda: outs.extend(net.backbone(X[..., :size]) for size in (4, 2)))
    assert [call.name for call in calls] == ['backbone', 'alias'] * 2
    assert all(call.out is outs[i // 2] for i, call in enumerate(calls))


def test_what_others_set_before_a_start_runs_and_comes_back(net):
    recorder = CallRecorder({'head': net.head})
    net.head.forward = marked = lambda x: x + 1
    for _ in range(2):
        (call,) = recorder.record(lambda: net(X))
        torch.testing.assert_close(call.out, net.backbone(X) + 1)
        assert net.head.forward is marked


def test_a_copy_between_two_records_runs_its_own_weights(net):
    recorder = CallRecorder({'backbone': net.backbone})
    recorder.record(lambda: net(X))
    copy = deepcopy(net)
    copy.backbone.weight.data += 1
    assert not torch.equal(copy(X), net(X))


def test_a_compiled_model_is_compiled_once_for_all_records(net):
    torch._dynamo.reset()
    backend = CompileCounterWithBackend('eager')
    net.compile(backend=backend)
    recorder = CallRecorder({'backbone': net.backbone, 'head': net.head})
    counts = []
    for _ in range(3):
        expected = net(X)
        _, head = recorder.record(lambda: net(X))
        torch.testing.assert_close(head.out, expected)
        counts.append(backend.frame_count)
    assert counts[0] == counts[2], counts
