import pytest
import torch
from mmengine.config import Config
from mmengine.device import get_device
from torch import nn

from mmdynsparse.utils.command_line import cpu

needs_no_gpu = pytest.mark.skipif(get_device() != 'cpu', reason='an accelerator is present')


@needs_no_gpu
@pytest.mark.parametrize(
    ('scope', 'wrapper'),
    [
        ('mmseg', 'mmdynsparse.utils.command_line.cpu.BFloat16OptimWrapper'),
        ('mmdet', 'OptimWrapper'),
    ],
)
def test_mixed_precision_on_cpu(scope: str, wrapper: str) -> None:
    amp = dict(type='AmpOptimWrapper', loss_scale='dynamic', dtype='float16', clip_grad=None)
    cfg = Config(dict(default_scope=scope, launcher='none', optim_wrapper=amp))
    cpu.adapt_to_cpu(cfg)
    assert dict(cfg.optim_wrapper) == dict(type=wrapper, clip_grad=None)


def test_bfloat16_wrapper_casts_the_forward_pass() -> None:
    layer = nn.Linear(4, 4)
    wrapper = cpu.BFloat16OptimWrapper(torch.optim.SGD(layer.parameters(), lr=0.1))
    before = layer.weight.detach().clone()
    with wrapper.optim_context(layer):
        out = layer(torch.ones(2, 4))
    assert out.dtype == torch.bfloat16 and layer.weight.dtype == torch.float32
    wrapper.update_params(out.float().sum())
    assert not torch.equal(layer.weight, before)


@needs_no_gpu
def test_distributed_config_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, '_init_gloo', lambda launcher: None)
    head = dict(norm_cfg=dict(type='SyncBN', requires_grad=True))
    cfg = Config(dict(launcher='pytorch', model=dict(decode_head=[head, head]), sync_bn='torch'))
    cpu.adapt_to_cpu(cfg)
    assert [h.norm_cfg.type for h in cfg.model.decode_head] == ['BN', 'BN']
    assert 'sync_bn' not in cfg
    assert cfg.model_wrapper_cfg.device_ids is None
    assert cfg.model_wrapper_cfg.type == 'MMDistributedDataParallel'
    wrapper = dict(type='MyWrapper', find_unused_parameters=True)
    cfg = Config(dict(launcher='pytorch', model_wrapper_cfg=wrapper))
    cpu.adapt_to_cpu(cfg)
    assert dict(cfg.model_wrapper_cfg) == dict(**wrapper, device_ids=None)
