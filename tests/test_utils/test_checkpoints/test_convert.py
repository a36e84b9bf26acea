import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from mmdynsparse.models import SparseSwinTransformer
from mmdynsparse.utils import convert_checkpoint

SPARSE = dict(keep_ratio=[0.7, 0.5, 0.3])


def new_keys(model):
    return {k for k in model.state_dict() if 'predictors.' in k or '.fast_path.' in k}


def swin_layout(timm_state_dict):
    """Rename timm's keys to those of the original repository: merging ends a stage."""
    out = {}
    for name, value in timm_state_dict.items():
        parts = name.split('.')
        if '.downsample.' in name:
            parts[1] = str(int(parts[1]) - 1)
        out['.'.join(parts)] = value
    return {'model': {**out, 'layers.0.blocks.1.attn_mask': torch.zeros(4, 49, 49)}}


@pytest.fixture(scope='module')
def timm_swin():
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    model = timm.models.swin_transformer.SwinTransformer(
        img_size=224, embed_dim=24, depths=(2, 2, 6, 2), num_heads=(2, 3, 6, 6), num_classes=10
    )
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model.eval()


@pytest.mark.parametrize('package', ['mmseg', 'mmdet'])
@pytest.mark.parametrize('prefix', ['', 'backbone.', 'module.backbone.'])
def test_openmmlab_checkpoints(package, prefix, tiny_swin):
    dense = pytest.importorskip(f'{package}.models.backbones').SwinTransformer(**tiny_swin)
    state = {prefix + k: v for k, v in dense.state_dict().items()}
    if prefix:
        state[prefix.replace('backbone', 'decode_head') + 'weight'] = torch.zeros(1)
    model = SparseSwinTransformer(**tiny_swin, sparsity=SPARSE)
    keys = model.load_state_dict(convert_checkpoint({'state_dict': state}, package), strict=False)
    assert keys.unexpected_keys == [] and set(keys.missing_keys) == new_keys(model)


@pytest.mark.parametrize('source', ['timm', 'swin'])
def test_classification_checkpoints(source, timm_swin, tiny_swin):
    state = timm_swin.state_dict()
    state = swin_layout(state) if source == 'swin' else state
    model = SparseSwinTransformer(**tiny_swin, sparsity=SPARSE).eval()
    keys = model.load_state_dict(convert_checkpoint(state, source), strict=False)
    assert keys.unexpected_keys == [] and set(keys.missing_keys) == new_keys(model)
    model.set_keep_ratio(1.0)
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = timm_swin.forward_features(x).permute(0, 3, 1, 2)
        assert (model(x)[-1] - expected).abs().max() <= 1e-5


def test_mmdet_agrees_on_the_original_layout(timm_swin, tiny_swin):
    swin = pytest.importorskip('mmdet.models.backbones.swin')
    state = swin_layout(timm_swin.state_dict())
    theirs = {k[9:]: v for k, v in swin.swin_converter(state['model']).items()}
    ours = convert_checkpoint(state, 'swin')
    for name in set(ours) & set(theirs):
        assert torch.equal(ours[name], theirs[name]), name
    assert any('downsample' in k for k in set(ours) & set(theirs))


def test_outputs_that_are_not_asked_for_are_dropped(timm_swin, tiny_swin):
    model = SparseSwinTransformer(**tiny_swin, sparsity=SPARSE, out_indices=(1, 3))
    state = convert_checkpoint(timm_swin.state_dict(), 'timm')
    keys = model.load_state_dict(state, strict=False)
    assert keys.unexpected_keys == [] and set(keys.missing_keys) == new_keys(model)


def test_published_dynamic_swin(recorded):
    """Every recorded tensor within 1e-4, and the same kept sets."""
    record = torch.load(recorded / 'oracle' / 'dynamic_swin.pth', weights_only=True)
    config, expected = record['config'], record['eval']
    model = SparseSwinTransformer(
        embed_dims=config['embed_dim'],
        depths=config['depths'],
        num_heads=config['num_heads'],
        window_size=config['window_size'],
        sparsity=dict(locations={2: config['pruning_loc']}, keep_ratio=config['sparse_ratio']),
    ).eval()
    keys = model.load_state_dict(convert_checkpoint(record['state_dict'], 'dynamicvit'))
    assert keys.missing_keys == keys.unexpected_keys == []

    stages = [None] * 4
    for i, stage in enumerate(model.stages):
        stage.register_forward_hook(lambda m, args, out, i=i: stages.__setitem__(i, out[0]))
    with torch.no_grad():
        outs = model(record['input'])
        for i, (stage, hw) in enumerate(
            zip(model.stages, [o.shape[2:] for o in outs], strict=True)
        ):
            out = stage.downsample(stages[i], hw)[0] if stage.downsample else stages[i]
            torch.testing.assert_close(out, expected[f'tap.layers.{i}'], atol=1e-4, rtol=0)
    norm = outs[-1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(norm, expected['tap.norm'], atol=1e-4, rtol=0)
    for i, decision in enumerate(model.decisions):
        scores = expected[f'predictor{i}.log_probs'][..., 0]
        torch.testing.assert_close(decision.scores, scores, atol=1e-4, rtol=0)
        count = int(scores.shape[1] * config['sparse_ratio'][i])
        kept = scores.argsort(dim=1, descending=True)[:, :count].sort(1).values
        ours = decision.mask.nonzero()[:, 1].view(len(scores), count)
        assert torch.equal(ours, kept)


def test_small_maps_stay_unshifted_through_a_checkpoint_file(recorded, tmp_path, tiny_swin):
    record = torch.load(recorded / 'oracle' / 'dynamic_swin.pth', weights_only=True)
    models = [SparseSwinTransformer(**tiny_swin, sparsity=SPARSE).eval() for _ in range(2)]
    models[0].load_state_dict(convert_checkpoint(record['state_dict'], 'dynamicvit'))
    torch.save(models[0].state_dict(), tmp_path / 'model.pth')
    models[1].load_state_dict(torch.load(tmp_path / 'model.pth'))
    with torch.no_grad():
        a, b = (m(record['input'])[-1] for m in models)
    assert torch.equal(a, b)
    assert not models[1].stages[3].blocks[1].attn.shift_small_maps


def test_another_window_size_is_resized(tiny_swin):
    small = SparseSwinTransformer(**tiny_swin, window_size=4)
    nn.init.normal_(small.stages[0].blocks[0].attn.w_msa.relative_position_bias_table)
    large = SparseSwinTransformer(**tiny_swin, window_size=7)
    large.load_state_dict(small.state_dict())
    tables = [
        m.stages[0].blocks[0].attn.w_msa.relative_position_bias_table.detach()
        for m in (small, large)
    ]
    middle = [t.view(s, s, -1)[s // 2, s // 2] for t, s in zip(tables, (7, 13), strict=True)]
    torch.testing.assert_close(*middle, atol=0.2, rtol=0)


# --- init_cfg ------------------------------------------------------------------------------------


def build(tiny_swin, path, **kwargs):
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    model = SparseSwinTransformer(**tiny_swin, sparsity=SPARSE, init_cfg=init_cfg, **kwargs)
    model.init_weights()
    return model


def test_init_cfg_loads_a_dense_checkpoint(tmp_path, tiny_swin):
    dense = pytest.importorskip('mmseg.models.backbones').SwinTransformer(**tiny_swin)
    state = {f'backbone.{k}': v for k, v in dense.state_dict().items()}
    torch.save({'state_dict': state, 'meta': {}}, tmp_path / 'dense.pth')
    model = build(tiny_swin, tmp_path / 'dense.pth')
    for name, value in dense.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_pretrained_files_of_mmseg_still_hold_parts_of_the_classifier(
    tmp_path, timm_swin, tiny_swin
):
    """mmseg's own converter leaves final norm, masks and position indices in the file."""
    mmseg = pytest.importorskip('mmseg')
    script = Path(mmseg.__file__).parent / '.mim/tools/model_converters/swin2mmseg.py'
    convert_swin = runpy.run_path(str(script))['convert_swin']
    state = convert_swin(swin_layout(timm_swin.state_dict())['model'])
    assert any(k.endswith('attn_mask') for k in state) and 'norm.weight' in state
    torch.save({'state_dict': state}, tmp_path / 'swin.pth')
    model = build(tiny_swin, tmp_path / 'swin.pth')
    name = 'stages.1.downsample.reduction.weight'
    assert torch.equal(
        model.state_dict()[name], convert_checkpoint(timm_swin.state_dict(), 'timm')[name]
    )


def test_small_maps_stay_unshifted_through_init_cfg(tmp_path, timm_swin, tiny_swin):
    state = convert_checkpoint(timm_swin.state_dict(), 'timm')
    torch.save({'state_dict': state}, tmp_path / 'timm.pth')
    attn = build(tiny_swin, tmp_path / 'timm.pth').stages[3].blocks[1].attn
    assert not attn.shift_small_maps


def test_position_embedding_of_another_size_is_resized(tiny_swin):
    kwargs = dict(tiny_swin, use_abs_pos_embed=True)
    small = SparseSwinTransformer(**kwargs, pretrain_img_size=32)
    nn.init.constant_(small.absolute_pos_embed, 0.5)
    large = SparseSwinTransformer(**kwargs, pretrain_img_size=64)
    large.load_state_dict(small.state_dict())
    torch.testing.assert_close(large.absolute_pos_embed.data, torch.full((1, 256, 24), 0.5))


def test_convert_weights_is_mmdets(tmp_path, timm_swin, tiny_swin):
    torch.save(swin_layout(timm_swin.state_dict()), tmp_path / 'swin.pth')
    backbones = pytest.importorskip('mmdet.models.backbones')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'swin.pth'))
    theirs = backbones.SwinTransformer(**tiny_swin, convert_weights=True, init_cfg=init_cfg)
    theirs.init_cfg = type('Cfg', (dict,), {'checkpoint': init_cfg['checkpoint']})(init_cfg)
    theirs.init_weights()
    theirs.train(False)
    ours = build(tiny_swin, tmp_path / 'swin.pth', convert_weights=True).eval()
    ours.set_keep_ratio(1.0)
    # mmdet leaves the classification model's final norm out.
    theirs.norm3.load_state_dict(ours.norm3.state_dict())
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        for a, b in zip(theirs(x), ours(x), strict=True):
            torch.testing.assert_close(b, a, atol=1e-5, rtol=0)


def test_missing_and_corrupt_files(tmp_path, tiny_swin):
    with pytest.raises(
        ValueError, match=r"init_cfg.checkpoint must be an existing checkpoint, got '.*x"
    ):
        build(tiny_swin, tmp_path / 'x.pth')
    (tmp_path / 'bad.pth').write_bytes(b'not a checkpoint')
    with pytest.raises(
        ValueError, match=r'init_cfg.checkpoint must be a checkpoint that torch.load can read'
    ):
        build(tiny_swin, tmp_path / 'bad.pth')


def test_a_mismatch_says_which_keys(tmp_path, tiny_swin):
    state = SparseSwinTransformer(**tiny_swin).state_dict()
    del state['stages.0.blocks.0.norm1.weight']
    state['stages.2.blocks.9.norm1.weight'] = torch.zeros(1)
    torch.save(state, tmp_path / 'odd.pth')
    message = r'missing stages.0.blocks.0.norm1.weight, unexpected stages.2.blocks.9.norm1.weight'
    with pytest.raises(ValueError, match=message):
        build(tiny_swin, tmp_path / 'odd.pth')


def test_bad_source_and_layout(tiny_swin):
    state = SparseSwinTransformer(**tiny_swin).state_dict()
    with pytest.raises(ValueError, match=r"source must be one of .*'dynamicvit'.*got 'keras'"):
        convert_checkpoint(state, 'keras')
    with pytest.raises(ValueError, match=r"source 'swin' expects names such as 'layers\.0"):
        convert_checkpoint(state, 'swin')
