"""Published SPViT checkpoints against recorded outputs, costs and gradients."""

import pytest
import torch

from mmdynsparse.layers import SinglePathMixer, SinglePathTokenMSA, SinglePathWindowMSA
from mmdynsparse.models import SparseSwinTransformer, SparseVisionTransformer
from mmdynsparse.ops import (
    BlockShape,
    cost_gates,
    ffn_macs,
    gated_cost,
    mixer_macs,
    single_path,
)
from mmdynsparse.utils import convert_checkpoint
from mmdynsparse.utils.checkpoints import is_new


def backbone(config, pruning, **kwargs):
    norm_cfg = dict(type='LN', eps=config['norm_eps'])
    if 'depths' in config:
        return SparseSwinTransformer(
            embed_dims=config['embed_dim'],
            depths=config['depths'],
            num_heads=config['num_heads'],
            window_size=config['window_size'],
            drop_path_rate=0.0,
            norm_cfg=norm_cfg,
            pruning=pruning,
            **kwargs,
        ).eval()
    return SparseVisionTransformer(
        img_size=config['img_size'],
        patch_size=config['patch_size'],
        embed_dims=config['embed_dim'],
        num_layers=config['depth'],
        num_heads=config['num_heads'],
        norm_cfg=norm_cfg,
        patch_bias=True,
        final_norm=True,
        pruning=pruning,
        **kwargs,
    ).eval()


def load(model, state):
    keys = model.load_state_dict(convert_checkpoint(state, 'spvit'), strict=False)
    assert not keys.missing_keys and not keys.unexpected_keys


def close(got, expected, tolerance=1e-4):
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


def taps(model):
    """Outputs of all blocks by the published names, filled by a forward."""
    out = {}
    parts = getattr(model, 'layers', None)
    if parts is not None:
        named = {f'tap.blocks.{i}': layer for i, layer in enumerate(parts)}
    else:
        named = {
            f'tap.layers.{i}.blocks.{j}': block
            for i, stage in enumerate(model.stages)
            for j, block in enumerate(stage.blocks)
        }
    for name, block in named.items():
        block.register_forward_hook(lambda m, args, y, name=name: out.__setitem__(name, y))
    return out


@pytest.mark.parametrize(
    'name, key',
    [('deit', 'state_dict'), ('deit', 'state_dict_folded'), ('swin', 'state_dict')],
)
def test_fine_tuned_models(name, key, recorded):
    record = torch.load(recorded / 'oracle' / f'spvit_{name}.pth', weights_only=True)
    config = record['config']
    pruning = dict(mixers=config['mixers'], hidden=config['hidden'], norm_identity=True)
    model = backbone(config, pruning)
    load(model, record[key])
    outs = taps(model)
    with torch.no_grad():
        maps = model(record['input'])
    compared = [n for n in record['eval'] if n in outs]
    assert len(compared) == len(outs)
    for tap in compared:
        close(outs[tap], record['eval'][tap])
    last = maps[-1].flatten(2).transpose(1, 2)
    close(last, record['eval']['tap.norm'][:, -last.shape[1] :])


def test_a_fine_tuned_checkpoint_says_what_skipped_blocks_add(recorded):
    record = torch.load(recorded / 'oracle' / 'spvit_deit.pth', weights_only=True)
    config = record['config']
    model = backbone(config, dict(mixers=config['mixers'], hidden=config['hidden']))
    with pytest.raises(ValueError, match='norm_identity must be True for this checkpoint'):
        model.load_state_dict(convert_checkpoint(record['state_dict'], 'spvit'), strict=False)


def in_windows(convolve):
    """The 3 x 3 convolution as their Swin searches: in the attention's windows."""

    def function(self, x, hw, kernels, norm, size):
        window, shift = self.window_size, self.shift(hw)
        if size == 1:
            return convolve(self, x, hw, kernels, norm, size)
        rows, cols = (side // window for side in hw)
        x = x.unflatten(1, hw).roll((-shift, -shift), (1, 2))
        x = x.unflatten(2, (cols, window)).unflatten(1, (rows, window)).transpose(2, 3)
        x = x.flatten(3, 4).flatten(0, 2)
        x = convolve(self, x, (window, window), kernels, norm, size)
        x = x.unflatten(0, (-1, rows, cols)).unflatten(3, (window, window)).transpose(2, 3)
        x = x.flatten(3, 4).flatten(1, 2)
        return x.roll((shift, shift), (1, 2)).flatten(1, 2)

    return function


def search_model(record, state, monkeypatch):
    # Their class token gets the normalized one from a convolution, in a search as well.
    monkeypatch.setattr(SinglePathTokenMSA, 'class_update', lambda self, x: x)
    if 'depths' in record['config']:
        convolve = in_windows(SinglePathMixer._convolve)
        monkeypatch.setattr(SinglePathWindowMSA, '_convolve', convolve)
    model = backbone(record['config'], dict(search=True))
    load(model, {**record['state_dict'], **record['gates'][state]})
    return model


def cost(model, size):
    """The published cost but for what is fixed: mixers and FFNs without the class token."""
    total = 0
    for name, module in model.named_modules():
        if name.endswith(('.attn', '.ffn')) and hasattr(module, 'gate_logits'):
            stage = 0 if 'layers' in name else int(name.split('.')[1])
            shape: BlockShape = model.geometry.shapes(size)[stage]
            gates = cost_gates(module.gate_logits)
            if name.endswith('.attn'):
                total = total + gated_cost(gates, mixer_macs(shape))
            else:
                unit = ffn_macs(shape._replace(tokens=shape.locations))
                total = total + unit * gates.sum()
    return total


@pytest.mark.parametrize('name, states', [('deit', 'ab'), ('swin', 'abc')])
def test_searches_at_inference(name, states, recorded, monkeypatch):
    """Outputs, cost and the gradient of the cost."""
    record = torch.load(recorded / 'oracle' / f'spvit_search_{name}.pth', weights_only=True)
    config = record['config']
    for state in states:
        model, expected = search_model(record, state, monkeypatch), record['eval'][state]
        outs = taps(model)
        with torch.no_grad():
            model(record['input'])
        for tap, value in outs.items():
            close(value, expected[tap], 1e-3 if name == 'swin' else 1e-4)
        size = (config['img_size'],) * 2
        macs = cost(model, size)
        fixed = expected['macs'] - expected['macs_mixers'] - expected['macs_ffn']
        assert macs.item() + fixed == pytest.approx(expected['macs'], rel=1e-6)
        loss = config['loss_lambda'] * (config['target_flops'] - (macs + fixed) / 1e9) ** 2
        assert loss.item() == pytest.approx(expected['loss_cost'], rel=1e-2)
        gates = {n: p for n, p in model.named_parameters() if n.endswith('.gate_logits')}
        grads = torch.autograd.grad(loss, list(gates.values()))
        theirs = convert_checkpoint({**record['state_dict'], **expected['grad_cost']}, 'spvit')
        for gate, grad in zip(gates, grads, strict=True):
            scale = theirs[gate].abs().max().item()
            torch.testing.assert_close(grad, theirs[gate], atol=1e-2 * scale + 1e-12, rtol=1e-2)


@pytest.mark.parametrize('step', [0, 1])
@pytest.mark.parametrize('name', ['deit', 'swin'])
def test_a_search_in_training(name, step, recorded, monkeypatch):
    """Samples, outputs, gradients of the gates and statistics, by the recorded draws."""
    record = torch.load(recorded / 'oracle' / f'spvit_search_{name}.pth', weights_only=True)
    expected = record['train'][step]
    draws = iter(expected['uniforms'].values())
    model = search_model(record, 'train', monkeypatch).train()
    monkeypatch.setattr(torch, 'rand_like', lambda logits: next(draws))
    outs = taps(model)
    out = model(record['input'])[-1]
    if name == 'swin':
        close(out.flatten(2).transpose(1, 2), expected['tap.norm'], 1e-3)
        features = out.mean((2, 3))
    else:
        for tap, value in outs.items():
            close(value, expected[tap])
        features = model.ln1(outs[f'tap.blocks.{len(outs) - 1}'])[:, 0]
    head = [record['state_dict'][f'head.{n}'] for n in ('weight', 'bias')]
    loss = torch.nn.functional.cross_entropy(
        torch.nn.functional.linear(features, *head), record['labels']
    )
    assert loss.item() == pytest.approx(expected['loss_task'], abs=1e-4)
    names = [n for n, p in model.named_parameters() if n.endswith(('gate_logits', 'head_logits'))]
    # Unused gates of the last FFN have no gradient where nothing reads them.
    grads = torch.autograd.grad(loss, [model.get_parameter(n) for n in names], allow_unused=True)
    theirs = convert_checkpoint({**record['state_dict'], **expected['grad_task']}, 'spvit')
    for name, grad in zip(names, grads, strict=True):
        torch.testing.assert_close(grad, theirs[name], atol=1e-4, rtol=1e-2, msg=name)
    buffers = convert_checkpoint({**record['state_dict'], **expected['bn_after']}, 'spvit')
    for name, value in model.named_buffers():
        if is_new(name):
            torch.testing.assert_close(value, buffers[name], atol=1e-4, rtol=1e-4)


def test_slots_map_rows_and_columns():
    """Position (row, column) is their slot row + 3 column, or with the centre first."""
    from mmdynsparse.utils.checkpoints.layouts.spvit import SLOTS

    deit = [row + 3 * col for row in range(3) for col in range(3)]
    assert SLOTS['deit'] == deit
    centre_first = [4, 0, 1, 2, 3, 5, 6, 7, 8]
    assert SLOTS['swin'] == [centre_first.index(slot) for slot in deit]
    assert single_path.CENTRE == 4
