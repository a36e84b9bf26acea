"""Parts of the tools that need no process of their own."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.device import get_device
from torch import nn

from mmdynsparse.utils.checkpoints import check_checkpoint, check_weights
from mmdynsparse.utils.command_line import cpu
from mmdynsparse.utils.command_line.launch import set_resume

needs_no_gpu = pytest.mark.skipif(get_device() != 'cpu', reason='an accelerator is present')


class Block(nn.Module):
    """A layer with the submodules that a sparse backbone, and a neck or head, add."""

    def __init__(self, sparse: bool, keep_ratios: tuple[float, ...]) -> None:
        super().__init__()
        self.keep_ratios = keep_ratios
        self.ffn = nn.Linear(2, 2)
        if sparse:
            self.predictors = nn.ModuleList([nn.Linear(2, 2)])
            self.fast_path = nn.Linear(2, 2)
            self.predictor = nn.Linear(2, 2)


def model(sparse: bool, *keep_ratios: float) -> nn.Module:
    """Returns a model with one block, named as in a segmentor."""
    return nn.ModuleDict({'backbone': Block(sparse, keep_ratios), 'norm': nn.BatchNorm1d(2)})


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_weights_that_fit(prefix: str) -> None:
    source, target = model(True), model(True)
    weights = {prefix + key: value for key, value in source.state_dict().items()}
    check_weights(target, weights, 'x.pth')
    assert torch.equal(target['backbone'].ffn.weight, source['backbone'].ffn.weight)


@pytest.mark.parametrize(('into', 'kind'), [(True, 'missing'), (False, 'unexpected')])
def test_sparse_parts_are_needed_unless_dense(into: bool, kind: str) -> None:
    weights = model(not into).state_dict()
    for ratios in ((0.7,), (1.0, 0.9)):
        with pytest.raises(ValueError, match=rf'6 {kind} keys \(backbone.*predictors'):
            check_weights(model(into, *ratios), weights, 'x.pth')
    for ratios in ((), (1.0, 1)):
        check_weights(model(into, *ratios), weights, 'x.pth')


def test_weights_of_another_shape() -> None:
    weights = model(True).state_dict()
    weights['backbone.ffn.bias'] = torch.zeros(3)
    with pytest.raises(ValueError, match=r'1 keys of another shape \(backbone\.ffn\.bias\)'):
        check_weights(model(True), weights, 'x.pth')


def test_addresses_are_not_opened() -> None:
    assert check_checkpoint('load_from', 'https://example.org/none.pth') == {}


@pytest.mark.parametrize('setting', ['option', 'config'])
def test_resume_without_checkpoint_starts_from_load_from(tmp_path: Path, setting: str) -> None:
    load_from = 'dense.pth' if setting == 'option' else None
    cfg = Config(dict(work_dir=str(tmp_path), load_from=load_from, resume=setting == 'config'))
    set_resume(cfg, 'auto' if setting == 'option' else None)
    assert cfg.load_from == load_from and not cfg.resume


def test_resume_prefers_the_latest_checkpoint(tmp_path: Path) -> None:
    (tmp_path / 'last_checkpoint').write_text('runs/iter_8.pth')
    cfg = Config(dict(work_dir=str(tmp_path), load_from='dense.pth'))
    set_resume(cfg, 'auto')
    assert cfg.load_from == 'runs/iter_8.pth' and cfg.resume
    set_resume(cfg, 'other.pth')
    assert cfg.load_from == 'other.pth' and cfg.resume


def test_no_resume_keeps_the_config(tmp_path: Path) -> None:
    cfg = Config(dict(work_dir=str(tmp_path), load_from='dense.pth'))
    set_resume(cfg, None)
    assert cfg.load_from == 'dense.pth' and not cfg.get('resume')


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


def test_convert_checkpoint(load_tool: Callable, tmp_path: Path, fails: Callable) -> None:
    tool = load_tool('model_converters/convert_checkpoint.py')
    src, dst = tmp_path / 'src.pth', tmp_path / 'new' / 'dst.pth'
    weights = {'patch_embed.projection.weight': torch.ones(4, 3, 4, 4)}
    torch.save(dict(state_dict=weights), src)
    tool.main([str(src), str(dst), '--source', 'mmseg'])
    assert torch.load(dst)['state_dict'].keys() == weights.keys()
    name = 'model_converters/convert_checkpoint.py'
    assert "invalid choice: 'keras'" in fails(name, src, dst, '--source', 'keras')
    assert 'src must be an existing' in fails(name, tmp_path / 'no.pth', dst, '--source', 'swin')
