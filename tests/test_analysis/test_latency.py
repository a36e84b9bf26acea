import time

import pytest
import torch

from mmdynsparse.analysis import compare_latency


def test_calls_alternate_and_warmup_is_not_timed():
    calls = []

    def record(name):
        return lambda: calls.append((name, torch.is_grad_enabled()))

    compare_latency({'a': record('a'), 'b': record('b')}, rounds=2, warmup=1)
    assert calls == [('a', False), ('b', False)] * 3


def test_milliseconds_and_percentiles():
    pauses = iter([0.05, 0.002, 0.002, 0.002, 0.02])
    result = compare_latency({'nap': lambda: time.sleep(next(pauses))}, rounds=4, warmup=1)['nap']
    assert 2 <= result.p10 <= result.median <= result.p90
    assert result.median < 15
    assert result.p90 > 10


def test_order_of_functions_is_kept():
    names = ['sparse', 'dense', 'another']
    assert list(compare_latency({name: int for name in names}, rounds=1)) == names


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(rounds=0), 'rounds must be at least 1, got 0'),
        (dict(warmup=-1), 'warmup must be at least 0, got -1'),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        compare_latency({'a': int}, **arguments)
