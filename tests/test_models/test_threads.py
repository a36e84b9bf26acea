"""Several threads may run one model in eval mode at once."""

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from runpy import run_path

import pytest
import torch
from mmengine.registry import MODELS

from mmdynsparse.models.decider import deciders

FEATURES = run_path(str(Path(__file__).with_name('test_features.py')))
BACKBONES = FEATURES['BACKBONES']
SIZES = [(1, (64, 96)), (2, (70, 90)), (1, (128, 64)), (3, (48, 48))]


def in_threads(function, inputs, rounds=6):
    """Run a function of each input several times in four threads, all at once."""
    jobs = inputs * rounds
    with ThreadPoolExecutor(4) as pool:
        outs = list(pool.map(lambda x: run_without_gradients(function, x), jobs))
    return [outs[i :: len(inputs)] for i in range(len(inputs))]


def run_without_gradients(function, x):
    with torch.no_grad():  # a setting of the thread
        return function(x)


def assert_as_alone(function, inputs):
    expected = [run_without_gradients(function, x) for x in inputs]
    for outs, alone in zip(in_threads(function, inputs), expected, strict=True):
        for out in outs:
            for one, other in zip(out, alone, strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    return expected


def assert_shows_a_whole_forward(decisions, expected):
    """The decisions are those of one of the forwards, all of them."""
    assert any(
        len(decisions) == len(maps.decisions)
        and all(
            one.mask.shape == other.mask.shape and torch.equal(one.mask, other.mask)
            for one, other in zip(decisions, maps.decisions, strict=True)
        )
        for maps in expected
    )


@pytest.fixture(params=BACKBONES)
def backbone(request, randomize):
    cfg = dict(BACKBONES[request.param], type=f'mmdynsparse.{request.param}')
    cfg['sparsity'] = cfg.get('sparsity', {}) | dict(keep_ratio=0.7)
    return randomize(MODELS.build(cfg)).eval()


def images():
    return [torch.randn(batch, 3, *size) for batch, size in SIZES]


@pytest.mark.parametrize('execution', ['gather', 'masked'])
def test_backbones(backbone, execution):
    backbone.execution = execution
    expected = assert_as_alone(backbone, images())
    assert_shows_a_whole_forward(backbone.decisions, expected)


def test_a_compiled_backbone(randomize):
    cfg = BACKBONES['SparseConvNeXt'] | dict(type='mmdynsparse.SparseConvNeXt')
    backbone = randomize(MODELS.build(cfg | dict(sparsity=dict(keep_ratio=0.7)))).eval()
    torch._dynamo.reset()
    compiled = torch.compile(backbone, fullgraph=True, backend='eager', dynamic=False)
    x = images()[:2]
    expected = assert_as_alone(compiled, x)
    assert_shows_a_whole_forward(backbone.decisions, expected)


def test_replicas_of_data_parallel(backbone):
    """They share nothing but weights, so each shows its own forward."""

    def replicate(module):
        twin = module._replicate_for_data_parallel()
        twin._parameters = dict(module._parameters)
        twin._buffers = dict(module._buffers)
        twin._modules = {k: v and replicate(v) for k, v in module._modules.items()}
        return twin

    inputs = images()
    replicas = [replicate(backbone) for _ in inputs]
    calls = dict(zip(map(id, inputs), replicas, strict=True))
    expected = assert_as_alone(lambda x: calls[id(x)](x), inputs)
    for replica, maps in zip(replicas, expected, strict=True):
        assert_shows_a_whole_forward(replica.decisions, [maps])
    assert backbone.decisions == ()


@pytest.mark.parametrize(('task', 'detector'), FEATURES['MODEL_KINDS'][:2])
def test_models_whose_head_follows_the_backbone(task, detector):
    model = FEATURES['build'](FEATURES['config'](task, detector), task)

    def predict(data):
        samples = model.predict(data['inputs'], copy.deepcopy(data['data_samples']))
        if task == 'seg':
            return [sample.seg_logits.data for sample in samples]
        return [sample.pred_instances.scores for sample in samples]

    batches = [FEATURES['batch'](task, model, False) for _ in range(2)]
    batches[1]['inputs'] = batches[1]['inputs'].flip(-1)
    assert_as_alone(predict, batches)
    for decider in deciders(model).values():
        assert len(decider.decisions) == 1
