"""Pruned backbones, and those whose gates search for what to prune."""

import random
import warnings

import pytest
import torch
from mmengine.registry import MODELS

from mmdynsparse.analysis import architecture_macs, count_macs
from mmdynsparse.analysis.architecture import parse_architecture
from mmdynsparse.ops import MIXERS
from mmdynsparse.utils.checkpoints import is_new, prune_state_dict

SWIN = dict(
    type='mmdynsparse.SparseSwinTransformer',
    embed_dims=12,
    depths=(1, 2, 2, 1),
    num_heads=(2, 3, 6, 6),
    drop_path_rate=0.0,
)
VIT = dict(
    type='mmdynsparse.SparseVisionTransformer',
    img_size=64,
    embed_dims=16,
    num_layers=5,
    num_heads=4,
    out_indices=(1, 2, 4),
)
MODELS_BY_NAME = {
    'swin': SWIN,
    'swin without biases': dict(SWIN, qkv_bias=False, window_size=4),
    'vit': VIT,
    'vit without class token': dict(VIT, with_cls_token=False, qkv_bias=False),
}


@pytest.fixture(params=MODELS_BY_NAME)
def cfg(request):
    return MODELS_BY_NAME[request.param]


@pytest.fixture
def build(randomize):
    """Function that builds a backbone with random weights and statistics, in eval mode."""

    def function(cfg, **kwargs):
        model = randomize(MODELS.build(dict(cfg, **kwargs)))
        for m in model.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2)
        return model.eval()

    return function


def max_diff(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def widths_and_depths(cfg):
    if 'num_layers' in cfg:
        return (4 * cfg['embed_dims'],), (cfg['num_layers'],)
    dims = [cfg['embed_dims'] * 2**i for i in range(len(cfg['depths']))]
    return tuple(4 * d for d in dims), cfg['depths']


def random_pruning(cfg, rng):
    """Random mixers, and widths of which some are 0 or full."""
    widths, depths = widths_and_depths(cfg)
    mixers = [[rng.choice(MIXERS) for _ in range(d)] for d in depths]
    hidden = [
        [rng.choice((0, w, rng.randint(1, w))) for _ in range(d)]
        for w, d in zip(widths, depths, strict=True)
    ]
    return dict(mixers=mixers, hidden=hidden)


def set_gates(model, rng):
    """Random gates; some FFNs are closed or open."""
    for name, p in model.named_parameters():
        if name.endswith('attn.gate_logits'):
            kind = rng.randrange(5)  # any state, or those of a plain operation
            signs = [rng.choice((-1, 1)) for _ in range(3)]
            p.data = torch.tensor(signs if kind > 3 else [1] * kind + [-1] * (3 - kind)).float()
        elif name.endswith('ffn.gate_logits'):
            shift = rng.choice((-9.0, 0.0, 0.0, 9.0))
            p.data = torch.randn(p.shape) + shift


def test_open_gates_are_the_dense_model(cfg, build):
    dense = build(cfg)
    search = build(cfg, pruning=dict(search=True))
    for name, p in search.named_parameters():
        if name.endswith('.gate_logits'):
            p.data.fill_(1.5)
    keys = search.load_state_dict(dense.state_dict(), strict=False)
    assert not keys.unexpected_keys
    assert keys.missing_keys and all(is_new(name) for name in keys.missing_keys)
    for size in ((64, 64), (73, 45)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            assert max_diff(search(x), dense(x)) <= 1e-5


def test_state_dict_names_of_a_search(cfg, build):
    dense, search = build(cfg), build(cfg, pruning=dict(search=True))
    new = search.state_dict().keys() - dense.state_dict().keys()
    parts = {name.split('attn.')[-1].split('ffn.')[-1].split('.')[0] for name in new}
    assert parts == {'gate_logits', 'head_logits', 'mix_norm1', 'mix_norm3'}
    shapes = {tuple(p.shape) for n, p in search.named_parameters() if 'attn.gate_logits' in n}
    assert shapes == {(3,)}


@pytest.mark.parametrize('seed', range(10))
def test_rebuilt_equals_searched(cfg, build, seed):
    """Odd sizes, a batch of three, nothing left of some blocks; four families make 40 states."""
    rng = random.Random(seed)
    search = build(cfg, pruning=dict(search=True), with_cp=bool(seed % 2))
    set_gates(search, rng)
    alpha = search.pruning.alpha
    for name, p in search.named_parameters():
        if name.endswith('head_logits'):
            p.data.mul_(alpha)
    state, mixers, hidden = prune_state_dict(search.state_dict(), alpha)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        static = build(cfg, pruning=dict(mixers=mixers, hidden=hidden))
        static.init_weights()
    keys = static.load_state_dict(state)
    assert not keys.missing_keys and not keys.unexpected_keys
    x = torch.randn(3, 3, 61, 83)
    with torch.no_grad():
        expected = search(x)
        assert max_diff(static(x), expected) <= 1e-5 * max(1, max(e.abs().max() for e in expected))
    for size in ((64, 96), (61, 83)):
        macs = architecture_macs(dict(cfg, pruning=dict(mixers=mixers, hidden=hidden)), size)
        assert macs == pytest.approx(count_macs(static, torch.randn(1, 3, *size)), rel=1e-3)
    assert not any(name.endswith(('attn.w_msa.qkv.weight',)) for name in state) or any(
        'msa' in stage for stage in mixers
    )


def test_units_are_gathered_in_their_order(cfg, build):
    """A pruned FFN has the rows and columns of the open gates, and gives the gated output."""
    search = build(cfg, pruning=dict(search=True))
    set_gates(search, random.Random(1))
    state = prune_state_dict(search.state_dict(), search.pruning.alpha).state_dict
    ffns = {name: m for name, m in search.named_modules() if name.endswith('.ffn')}
    for name, ffn in ffns.items():
        kept = (ffn.gate_logits > 0).nonzero().flatten().tolist()
        fc, act = ffn.layers[0][:2]
        w1, b1, w2, b2 = (state[f'{name}.layers.{k}'] for k in UNITS)
        assert torch.equal(w1, torch.stack([*fc.weight[kept]]) if kept else w1[:0])
        x = torch.randn(2, 3, fc.in_features)
        with torch.no_grad():
            expected = ffn(x, ffn.gates())
            got = torch.nn.functional.linear(act(x @ w1.t() + b1), w2, b2)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert len({len(state[f'{name}.layers.0.0.bias']) for name in ffns}) > 1


UNITS = ('0.0.weight', '0.0.bias', '1.weight', '1.bias')


def test_original_weights(cfg, build):
    """Gathered and mixed afresh, with fresh norms, as the published fine-tuning starts."""
    search, dense = build(cfg, pruning=dict(search=True)), build(cfg)
    for p in dense.parameters():
        p.data.add_(1)
    set_gates(search, random.Random(3))
    state, mixers, hidden = prune_state_dict(search.state_dict(), 1.0, dense.state_dict())
    fresh = {k: v for k, v in state.items() if '.attn.norm.' in k}
    for name, value in fresh.items():
        assert (value == int(name.endswith(('weight', 'running_var')))).all(), name
    static = build(cfg, pruning=dict(mixers=mixers, hidden=hidden))
    static.load_state_dict(state)
    norm2 = [k for k in state if 'norm2' in k or 'ln2' in k]
    assert norm2 and all(torch.equal(state[k], dense.state_dict()[k]) for k in norm2)
    with pytest.raises(ValueError, match=r'--original must hold .* got none'):
        prune_state_dict(search.state_dict(), 1.0, {})
    with pytest.raises(ValueError, match='checkpoint must be of a search'):
        prune_state_dict(dense.state_dict(), 1.0)


def test_every_parameter_of_a_search_gets_a_gradient(cfg, build):
    """In every state of the gates, as distributed training wants it."""
    grads = []
    for with_cp in (False, True):
        model = build(cfg, pruning=dict(search=True), with_cp=with_cp).train()
        torch.manual_seed(1)
        for p in model.parameters():
            p.grad = None
        x = torch.randn(2, 3, 64, 64)
        sum(out.square().mean() for out in model(x)).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * b.abs().max().item() + 1e-7, rtol=1e-3)


def test_a_search_in_mixed_precision(cfg, build):
    """Under bfloat16 autocast gates are exact, and outputs and gradients near those in float32."""
    found = []
    for enabled in (False, True):
        model = build(cfg, pruning=dict(search=True)).train()
        torch.manual_seed(1)
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            out = model(torch.randn(2, 3, 64, 64))[-1]
        out.float().square().mean().backward()
        gates = [p for name, p in model.named_parameters() if name.endswith('gate_logits')]
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in gates)
        found.append((out.detach().float(), torch.cat([p.grad.flatten() for p in gates])))
    for exact, got in zip(*found, strict=True):
        assert (got - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize('seed', range(4))
def test_pruned_and_sparse(cfg, build, seed):
    """Masked equals gathered, and keep ratio 1 is the pruned model."""
    pruning = random_pruning(cfg, random.Random(seed))
    locations = {0: (1, 3)} if 'num_layers' in cfg else {0: (0,), 2: (0, 1), 3: (0,)}
    sparsity = dict(keep_ratio=0.7, locations=locations)
    if 'depths' in cfg:
        sparsity['attention'] = bool(seed % 2)
    kwargs = dict(pruning=pruning, sparsity=sparsity)
    if 'num_layers' in cfg:
        kwargs['reactivate'] = bool(seed % 2)
    model, dense = build(cfg, **kwargs), build(cfg, pruning=pruning)
    dense.load_state_dict(model.state_dict(), strict=False)
    x = torch.randn(2, 3, 70, 90)
    with torch.no_grad():
        outs = []
        for execution in ('masked', 'gather'):
            model.execution = execution
            outs.append(model(x))
        scale = max(1, max(o.abs().max() for o in outs[0]))
        assert max_diff(*outs) <= 1e-5 * scale
        model.set_keep_ratio(1.0)
        assert max_diff(model(x), dense(x)) <= 1e-5 * scale
    sum(out.square().mean() for out in model.train()(x)).backward()


def test_exports_like_a_dense_model(cfg, build):
    model = build(cfg, pruning=random_pruning(cfg, random.Random(0)))
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        exported = torch.export.export(model, (x,), strict=False).module()
        assert max_diff(exported(x), model(x)) <= 1e-4 * max(1, model(x)[-1].abs().max())


def test_norm_identity_is_a_part_of_the_checkpoint(cfg, build):
    pruning = random_pruning(cfg, random.Random(0))
    model = build(cfg, pruning=dict(pruning, norm_identity=True))
    state = model.state_dict()
    with pytest.raises(ValueError, match='norm_identity must be True for this checkpoint, got'):
        build(cfg, pruning=pruning).load_state_dict(state, strict=False)
    twin = build(cfg, pruning=dict(pruning, norm_identity=True))
    twin.load_state_dict(state)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert max_diff(twin(x), model(x)) == 0


DEIT = dict(type=VIT['type'], img_size=224, patch_bias=True)
OPERATIONS = {'M': 'msa', '3': 'conv3', '1': 'conv1', '-': 'none'}
# Shipped architectures: config, mixers, hidden units, and at 224 x 224 GMACs by their formula and
# as counted, of the pruned and (counted) of the dense classifier, and millions of parameters.
PUBLISHED = {
    'DeiT-Ti': (
        dict(DEIT, embed_dims=192, num_heads=3),
        '11MMMMMMMMMM',
        [[744, 758, 764, 767, 766, 764, 756, 659, 633, 473, 179, 145]],
        (1.0367, 1.0386, 1.2537, 4.775),
    ),
    'DeiT-S': (
        dict(DEIT, embed_dims=384, num_heads=6),
        '1MMMMMMMMMMM',
        [[1304, 1399, 1344, 1214, 1251, 1183, 1140, 925, 742, 391, 104, 103]],
        (3.3465, 3.3532, 4.5989, 15.871),
    ),
    'DeiT-B': (
        DEIT,
        '11133MMMMMMM',
        [[1118, 489, 1050, 1345, 1336, 1326, 1431, 1564, 1606, 1702, 1290, 190]],
        (8.3906, 8.4091, 17.5638, 41.584),
    ),
    'DeiT-B, lower cost weight': (
        DEIT,
        '1113MMMMMMMM',
        [[1253, 610, 1343, 1912, 2354, 2306, 2483, 2753, 2869, 2860, 2443, 934]],
        (11.7308, 11.7642, 17.5638, 58.321),
    ),
    'Swin-T': (
        dict(type=SWIN['type']),
        '1- 1- MMMMMM MM',
        [[186, 152], [646, 504], [1350, 1319, 1289, 1249, 1234, 1082], [3041, 2994]],
        (3.3342, 3.3304, 4.4906, 26.232),
    ),
    'Swin-S': (
        dict(type=SWIN['type'], depths=(2, 2, 18, 2)),
        '1- MM MMMMMMMMMMMM-1MM-- MM',
        [
            [188, 209],
            [748, 680],
            [
                *(1159, 1260, 1127, 1036, 919, 916, 868, 918, 903),
                *(937, 961, 1037, 1063, 996, 888, 866, 741, 509),
            ],
            [3064, 3051],
        ],
        (6.1432, 6.1376, 8.7409, 38.922),
    ),
    'Swin-B': (
        dict(type=SWIN['type'], embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
        'M- MM MMMMMMM-MMMMMM-1M- MM',
        [
            [311, 303],
            [1011, 980],
            [
                *(1763, 1673, 1636, 1523, 1410, 1377, 1332, 1345, 1440),
                *(1426, 1400, 1315, 1371, 1321, 1324, 1265, 1127, 734),
            ],
            [3572, 2931],
        ],
        (11.3922, 11.3847, 15.4309, 67.542),
    ),
}


def published_macs(backbone: dict, hw: tuple[int, int], num_classes: int = 1000) -> int:
    """The multiply-adds of a classifier as ziplab/SPViT counts them.

    They count norms, with an operation for each channel, and give the FFNs and the convolutions of
    a DeiT no class token.
    """
    geometry, pruning = parse_architecture(backbone)
    shapes, maps = geometry.shapes(hw), geometry.maps(hw)
    mixers, hidden = (None, None) if pruning is None else (pruning.mixers, pruning.hidden)
    total = geometry.macs(hw, mixers, hidden) + num_classes * geometry.channels[-1]
    for i, (shape, run) in enumerate(zip(shapes, geometry.run, strict=True)):
        total += 2 * shape.tokens * shape.channels * run
        units = [geometry.widths[i]] * run if hidden is None else hidden[i]
        total -= 2 * geometry.class_tokens * shape.channels * sum(units)
    if geometry.window is not None:
        sizes = [h * w for h, w in maps]
        total += sizes[0] * geometry.channels[0]
        total += sum(n * c for n, c in zip(sizes, geometry.channels[:-1], strict=False))
        total += geometry.channels[-1] * sizes[0] // 2 ** len(sizes)
    return total


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_architectures(name):
    cfg, letters, hidden, expected = PUBLISHED[name]
    mixers = [[OPERATIONS[c] for c in stage] for stage in letters.split()]
    pruning = dict(mixers=mixers, hidden=hidden, norm_identity=True)
    pruned, size = dict(cfg, pruning=pruning), (224, 224)
    model = MODELS.build(pruned)
    channels = model.geometry.channels[-1]
    macs = architecture_macs(pruned, size) + 1000 * channels
    got = (published_macs(pruned, size), macs, architecture_macs(cfg, size) + 1000 * channels)
    assert [macs / 1e9 for macs in got] == pytest.approx(expected[:3], rel=1e-3)
    # A classifier has one norm, of its last stage, and a linear layer.
    params = {n: p.numel() for n, p in model.named_parameters()}
    params = sum(size for n, size in params.items() if not n.startswith('norm'))
    assert round((params + 1002 * channels + 1000) / 1e6, 3) == expected[3]


def test_other_types_have_no_closed_form():
    with pytest.raises(ValueError, match=r'backbone.type must be one of .*, got .*ConvNeXt'):
        architecture_macs(dict(type='mmdynsparse.SparseConvNeXt'), (64, 64))
