"""What holds for any small model and input that Hypothesis draws.

``HYPOTHESIS_PROFILE=fuzz``, which ``make fuzz`` sets, draws 10,000 cases at random; the default
profile draws the same few each time.
"""

import io
import os
from contextlib import contextmanager
from math import floor, prod

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from mmengine.registry import MODELS

from mmdynsparse.ops import SELECTORS, conv2d, kept_and_dropped, select_decision
from mmdynsparse.ops.select import num_kept, sample_decision, topk_mask
from mmdynsparse.utils import convert_checkpoint

COMMON = dict(
    deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck)
)
settings.register_profile('fast', max_examples=20, derandomize=True, **COMMON)
# For each of the nine tests.
settings.register_profile('fuzz', max_examples=1112, **COMMON)
settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'fast'))
pytestmark = pytest.mark.filterwarnings('ignore:When align_corners=True')

SEEDS = st.integers(0, 2**31)
RATIOS = st.sampled_from([0.05, 0.3, 0.5, 0.7, 0.95, 1.0])
BATCHES = st.integers(1, 3)
BOOLS = st.booleans()


def one_of(*values):
    return st.sampled_from(values)


def randomized(module, seed):
    """Give a module weights and statistics that hide nothing, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            spread = 0.3 if tensor.dim() < 2 else tensor[0].numel() ** -0.5
            tensor.normal_(0, spread, generator=generator)
            if 'running_var' in name:
                tensor.abs_().add_(0.5)
    module.eval()  # that of mmseg's Swin returns nothing
    return module


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(cfg, seed=0, scope='mmdynsparse'):
    with MODELS.switch_scope_and_registry(scope) as registry:
        return randomized(registry.build(cfg), seed)


def same(actual, expected):
    """Check nested outputs; floats may differ by rounding."""
    if not isinstance(expected, torch.Tensor):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            same(one, other)
        return
    finite = expected[expected.isfinite()]
    size = finite.abs().max().item() if finite.numel() else 0.0
    torch.testing.assert_close(actual, expected, atol=1e-4 * max(size, 1), rtol=0)


@contextmanager
def dice(seed, shares):
    """Let random numbers decide in place of scores, whose rounding may reverse an order.

    'topk' keeps its number, 'mass' each location of an image with that image's share.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(scores):
        return torch.rand(scores.shape, generator=generator)

    def fixed(scores, ratio):
        return topk_mask(drawn(scores).masked_fill(scores == -torch.inf, -1.0), ratio)

    def ragged(scores, ratio):
        keep = drawn(scores) < torch.tensor(shares).repeat(len(scores))[: len(scores), None]
        return (keep & (scores > -torch.inf)).float()

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SELECTORS, 'topk', fixed)
        patch.setitem(SELECTORS, 'mass', ragged)
        yield


DICE = st.tuples(SEEDS, st.lists(one_of(0.0, 0.1, 0.5, 0.9, 1.0), min_size=1, max_size=3))


@torch.no_grad()
def executions(function, set_execution, rolls):
    """Return what a function gives in masked and in gathered execution of the same decisions."""
    outs = []
    for execution in ('masked', 'gather'):
        set_execution(execution)
        with dice(*rolls):
            outs.append(function())
    return outs


@st.composite
def locations(draw, depths, first=0):
    """Draw blocks before which is decided, in at least one stage."""
    stages = [i for i, depth in enumerate(depths) if depth > first]
    chosen = draw(st.sets(st.sampled_from(stages), min_size=1))
    blocks = {i: st.sets(st.integers(first, depths[i] - 1), min_size=1) for i in sorted(chosen)}
    return {i: sorted(draw(strategy)) for i, strategy in blocks.items()}


@st.composite
def sparsities(draw, depths, first=0, cells=True):
    """Draw the argument of a backbone of several stages."""
    places = draw(locations(depths, first))
    follow = [i for i in list(places)[1:] if len(places[i]) == 1 and draw(BOOLS)]
    ratios = []
    for stage, blocks in places.items():
        ratios += ratios[-1:] if stage in follow else [draw(RATIOS) for _ in blocks]
    cell_size = st.lists(st.integers(1, 5), min_size=len(depths), max_size=len(depths))
    low_rank = dict(type='mmdynsparse.LowRankFastPath', reduction=2)
    kinds = [None, dict(type='mmdynsparse.LinearFastPath'), low_rank]
    predictors = [dict(type=f'mmdynsparse.{x}') for x in ('LocalGlobalPredictor', 'MagnitudeScore')]
    return dict(
        keep_ratio=ratios,
        locations=places,
        follow=follow,
        selector=draw(one_of('topk', 'mass')),
        cell_size=draw(cell_size) if cells or draw(BOOLS) else None,
        fast_path=draw(st.sampled_from(kinds)),
        predictor=draw(st.sampled_from(predictors)),
    )


@st.composite
def swins(draw):
    stages = draw(st.integers(1, 4))
    heads = [draw(one_of(1, 2, 4)) for _ in range(stages)]
    depths = [draw(st.integers(1, 3)) for _ in range(stages)]
    sparsity = draw(sparsities(depths, cells=False))
    attention = sparsity['cell_size'] is None and draw(BOOLS)
    return dict(
        type='SwinTransformer',
        embed_dims=draw(one_of(4, 8, 12)),
        depths=depths,
        num_heads=heads,
        strides=[4, 2, 2, 2][:stages],
        out_indices=list(range(stages)),
        window_size=draw(st.integers(2, 7)),
        mlp_ratio=draw(one_of(1, 2, 4)),
        qkv_bias=draw(BOOLS),
        patch_norm=draw(BOOLS),
        use_abs_pos_embed=draw(BOOLS),
        pretrain_img_size=draw(one_of(32, 64)),
        sparsity=dict(sparsity, attention=attention),
    )


@st.composite
def convnexts(draw):
    depths = [draw(st.integers(1, 3)) for _ in range(4)]
    channels = [draw(one_of(4, 8, 12, 20)) for _ in range(4)]
    return dict(
        type='ConvNeXt',
        arch=dict(depths=depths, channels=channels),
        out_indices=[0, 1, 2, 3],
        gap_before_final_norm=False,
        layer_scale_init_value=draw(one_of(0.0, 1.0)),
        sparsity=draw(sparsities(depths, cells=False)),
    )


@st.composite
def vits(draw, kinds=('VisionTransformer', 'LVViT')):
    layers = draw(st.integers(1, 5))
    places = draw(locations([layers]))
    reactivate, cls_token = draw(BOOLS), draw(BOOLS)
    ratios = [draw(RATIOS) for _ in places[0]]
    return dict(
        type=draw(st.sampled_from(kinds)),
        img_size=draw(one_of(32, 64)),
        patch_size=draw(one_of(8, 16)),
        embed_dims=draw(one_of(8, 16)),
        num_heads=draw(one_of(1, 2, 4)),
        num_layers=layers,
        mlp_ratio=draw(one_of(1, 2, 4)),
        out_indices=list(range(layers)),
        qkv_bias=draw(BOOLS),
        with_cls_token=cls_token,
        output_cls_token=cls_token and draw(BOOLS),
        final_norm=draw(BOOLS),
        reactivate=reactivate,
        sparsity=dict(
            keep_ratio=ratios if reactivate else sorted(ratios, reverse=True),
            locations=places,
            selector=draw(one_of('topk', 'mass')),
        ),
    )


@st.composite
def resnets(draw):
    depth = draw(one_of(18, 34, 50))
    depths = (2, 2, 2, 2) if depth == 18 else (3, 4, 6, 3)
    return dict(
        type=draw(one_of('ResNet', 'ResNetV1c', 'ResNetV1d')),
        depth=depth,
        base_channels=draw(one_of(4, 8)),
        stem_channels=draw(one_of(4, 8)),
        style=draw(one_of('pytorch', 'caffe')),
        strides=draw(one_of((1, 2, 2, 2), (1, 2, 2, 1), (1, 2, 1, 1))),
        dilations=draw(one_of((1, 1, 1, 1), (1, 1, 1, 2), (1, 1, 2, 4))),
        sparsity=draw(sparsities(depths, first=1)),
    )


def sparse_backbone(cfg, seed):
    return build(dict(cfg, type=f'mmdynsparse.Sparse{cfg["type"]}'), seed)


IMAGES = st.tuples(SEEDS, BATCHES, st.just(3), st.integers(32, 110), st.integers(32, 110))
FAMILIES = dict(swin=swins(), convnext=convnexts(), vit=vits(), resnet=resnets())


@given(st.one_of(*FAMILIES.values()), SEEDS, IMAGES, DICE)
def test_backbones_gathered_are_masked(cfg, seed, image, rolls):
    model, x = sparse_backbone(cfg, seed), normal(*image)

    def forward():
        outs = model(x)
        return outs, [decision.mask for decision in outs.decisions]

    masked, gathered = executions(forward, lambda e: setattr(model, 'execution', e), rolls)
    assert len(masked[1]) == len(model.keep_ratios)
    same(gathered, masked)


def dense_backbone(cfg, seed):
    """Return the dense original, its features of images and its weights in our names."""
    cfg = {k: v for k, v in cfg.items() if k not in ('sparsity', 'reactivate')}
    if cfg['type'] != 'ConvNeXt':
        dense = build(cfg, seed, 'mmseg')
        return dense, convert_checkpoint(dense.state_dict(), 'mmseg')
    convnext = pytest.importorskip('timm').models.convnext.ConvNeXt
    depths, dims = cfg['arch'].values()
    scale = cfg['layer_scale_init_value'] or None
    dense = randomized(convnext(depths=depths, dims=dims, ls_init_value=scale), seed)
    weights = convert_checkpoint(dense.state_dict(), 'timm')
    return lambda x: dense.forward_intermediates(x, intermediates_only=True), weights


ORIGINALS = [
    swins().map(lambda cfg: dict(cfg, use_abs_pos_embed=False)),  # mmseg's is of one size
    FAMILIES['convnext'],
    FAMILIES['resnet'],
    vits(kinds=('VisionTransformer',)),
]


@given(st.one_of(*ORIGINALS), SEEDS, IMAGES)
@torch.no_grad()
def test_backbones_that_keep_everything_are_the_dense_originals(cfg, seed, image):
    pytest.importorskip('mmseg.models')
    features, weights = dense_backbone(cfg, seed)
    model, x = sparse_backbone(cfg, seed), normal(*image)
    keys = model.load_state_dict(weights, strict=False)
    assert keys.unexpected_keys == []
    assert all('predictors.' in k or 'fast_path.' in k for k in keys.missing_keys)
    expected = features(x)
    if cfg['type'] == 'ConvNeXt':  # timm's features are not normalized
        expected = [getattr(model, f'norm{i}')(y) for i, y in enumerate(expected)]
    model.set_keep_ratio(1.0)
    for execution in ('gather', 'masked'):
        model.execution = execution
        same(model(x), expected)


@given(st.one_of(*FAMILIES.values()), SEEDS, IMAGES, st.sampled_from(list(SELECTORS)), RATIOS)
@torch.no_grad()
def test_backbones_come_back_from_checkpoints(cfg, seed, image, selector, budget):
    cfg = dict(cfg, sparsity=dict(cfg['sparsity'], selector=selector))
    assume(selector != 'threshold' or 'Magnitude' not in str(cfg))  # refused
    model, x = sparse_backbone(cfg, seed), normal(*image)
    model.decider.budgets = {str(budget): [budget] * len(model.keep_ratios)}
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = sparse_backbone(cfg, seed + 1)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert twin.decider.budgets == model.decider.budgets
    outs = []
    for module in (model, twin):
        torch.manual_seed(seed)  # selector 'random' draws
        outs.append(module(x))
    for one, other in zip(*outs, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


@st.composite
def pyramids(draw, least):
    """Draw channels and shapes of the maps of a backbone; a level halves the size, rounded up."""
    channels = draw(st.lists(one_of(4, 6, 8, 12), min_size=least, max_size=4))
    batch, size, shapes = draw(BATCHES), (draw(st.integers(6, 44)), draw(st.integers(6, 44))), []
    for count in channels:
        shapes.append((batch, count, *size))
        size = tuple((side + 1) // 2 for side in size)
    return channels, shapes


def normal_maps(seed, shapes):
    return [normal(seed + i, *shape) for i, shape in enumerate(shapes)]


CELL_PREDICTOR = dict(type='mmdynsparse.CellPredictor', reduction=1)


@st.composite
def cell_sparsities(draw, *predictors):
    return dict(
        keep_ratio=draw(RATIOS),
        cell_size=draw(one_of(2, 4, 8)),
        selector=draw(one_of('topk', 'mass')),
        predictor=draw(st.sampled_from([CELL_PREDICTOR, *predictors])),
    )


def execution_of(*parts):
    def set_execution(execution):
        for part in parts:
            part.decider.execution = execution

    return set_execution


@st.composite
def uper_heads(draw):
    """Draw arguments of an UPerHead and shapes of maps for it."""
    channels, shapes = draw(pyramids(2))
    arguments = dict(
        in_channels=channels,
        in_index=list(range(len(channels))),
        channels=draw(one_of(4, 8, 12)),
        num_classes=draw(st.integers(2, 6)),
        pool_scales=draw(one_of((1,), (1, 2), (1, 2, 3, 6))),
        norm_cfg=draw(one_of(None, dict(type='BN'))),
        align_corners=draw(BOOLS),
    )
    return arguments, shapes


@given(uper_heads(), cell_sparsities(None), BOOLS, SEEDS, DICE)
def test_uper_heads_gathered_are_masked(case, sparsity, resolution, seed, rolls):
    pytest.importorskip('mmseg.models')
    (arguments, shapes), sparsity = case, dict(sparsity, resolution=resolution)
    maps = normal_maps(seed, shapes)
    head = build(
        dict(arguments, type='mmdynsparse.SparseUPerHead', sparsity=sparsity), seed, 'mmseg'
    )
    masked, gathered = executions(lambda: head(maps), execution_of(head), rolls)
    same(gathered, masked)


@given(uper_heads(), cell_sparsities(None), SEEDS)
@torch.no_grad()
def test_uper_heads_that_keep_everything_are_the_dense_original(case, sparsity, seed):
    pytest.importorskip('mmseg.models')
    (arguments, shapes), sparsity = case, dict(sparsity, resolution=False, selector='mass')
    maps = normal_maps(seed, shapes)
    head = build(
        dict(arguments, type='mmdynsparse.SparseUPerHead', sparsity=sparsity), seed, 'mmseg'
    )
    dense = build(dict(arguments, type='UPerHead'), seed, 'mmseg')
    dense.load_state_dict(head.state_dict(), strict=False)
    expected = dense(maps)
    for execution in ('masked', 'gather'):
        head.decider.execution = execution
        with dice(0, [1.0]):
            same(head(maps), expected)


EXTRA_CONVS = one_of(False, 'on_input', 'on_lateral', 'on_output')


@st.composite
def detectors(draw):
    """Draw arguments of an FPN and of an RPN head, and shapes of maps for them."""
    channels, shapes = draw(pyramids(3))
    start = draw(st.integers(0, len(channels) - 3))
    levels = len(channels) - start + draw(st.integers(0, 2))
    neck = dict(
        in_channels=channels,
        out_channels=draw(one_of(4, 8)),
        start_level=start,
        num_outs=levels,
        add_extra_convs=draw(EXTRA_CONVS),
        relu_before_extra_convs=draw(BOOLS),
        norm_cfg=draw(one_of(None, dict(type='BN'))),
    )
    strides = [4 * 2**i for i in range(levels)]
    head = dict(
        in_channels=neck['out_channels'],
        feat_channels=draw(one_of(4, 8)),
        num_convs=draw(st.integers(1, 2)),
        anchor_generator=dict(
            type='AnchorGenerator', scales=[8], ratios=[0.5, 1.0], strides=strides
        ),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True),
        loss_bbox=dict(type='L1Loss'),
    )
    return neck, head, shapes


def sparse_neck_and_head(case, sparsity, seed):
    neck, head, _ = case
    neck = build(dict(neck, type='mmdynsparse.SparseFPN', sparsity=sparsity), seed, 'mmdet')
    head = build(dict(head, type='mmdynsparse.SparseRPNHead', sparsity={}), seed, 'mmdet')
    return neck, head


@given(detectors(), cell_sparsities(), SEEDS, DICE)
def test_necks_and_rpn_heads_gathered_are_masked(case, sparsity, seed, rolls):
    pytest.importorskip('mmdet.models')
    neck, head = sparse_neck_and_head(case, sparsity, seed)
    maps = normal_maps(seed, case[-1])

    def forward():
        outs = neck(maps)
        return outs, head(outs)

    masked, gathered = executions(forward, execution_of(neck, head), rolls)
    same(gathered, masked)


@given(detectors(), cell_sparsities(), SEEDS)
@torch.no_grad()
def test_necks_and_rpn_heads_that_keep_everything_are_dense(case, sparsity, seed):
    pytest.importorskip('mmdet.models')
    neck, head = sparse_neck_and_head(case, dict(sparsity, selector='mass'), seed)
    dense = build(dict(case[0], type='FPN'), seed, 'mmdet')
    dense_head = build(dict(case[1], type='RPNHead'), seed, 'mmdet')
    dense.load_state_dict(neck.state_dict(), strict=False)
    dense_head.load_state_dict(head.state_dict(), strict=False)
    maps = normal_maps(seed, case[-1])
    expected = dense(maps)
    expected = expected, dense_head(expected)
    for execution in ('masked', 'gather'):
        execution_of(neck, head)(execution)
        with dice(0, [1.0]):
            outs = neck(maps)
            same((outs, head(outs)), expected)


@st.composite
def scores(draw):
    """Draw log P(keep) with ties, a map and cells that may be kept."""
    hw = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    batch, n = draw(BATCHES), prod(hw)
    probability = st.one_of(one_of(0.25, 0.5, 0.75), st.floats(1e-6, 1 - 1e-6))
    rows = st.lists(probability, min_size=n, max_size=n)
    probs = torch.tensor([draw(rows) for _ in range(batch)])
    return torch.stack((probs, 1 - probs), -1).log(), hw


LIMITS = st.tuples(st.floats(0, 1), st.floats(0.01, 1)).map(sorted)


@given(scores(), RATIOS, st.sampled_from(list(SELECTORS)), LIMITS, BOOLS)
def test_selections_are_as_many_and_the_best(case, ratio, selector, limits, limited):
    (log_probs, hw), (least, most) = case, limits
    n = log_probs.shape[1]
    limited = limited and selector in ('mass', 'value')
    cfg = dict(type=selector, least=least, most=most) if limited else selector
    decision = select_decision(log_probs, hw, ratio, cfg)
    mask, probs = decision.mask, log_probs[..., 0].exp()
    assert ((mask == 0) | (mask == 1)).all()
    number = mask.sum(1)
    if selector in ('topk', 'sampled', 'random'):
        assert number.tolist() == [num_kept(n, ratio)] * len(mask)
    if selector == 'threshold':
        assert torch.equal(mask, (probs > 0.5).float())
    if limited:
        highest = max(1, floor(most * n + 1e-4))
        assert (number <= highest).all() and (number >= min(least * n - 1e-4, highest)).all()
    if selector == 'mass' and not limited:
        assert ((mask * probs).sum(1) >= ratio * probs.sum(1) * (1 - 1e-5)).all()
        worst = probs.masked_fill(mask == 0, torch.inf).amin(1)  # without it is less than the share
        assert ((mask * probs).sum(1) - worst <= ratio * probs.sum(1) * (1 + 1e-5)).all()
    if selector not in ('sampled', 'random'):  # nothing dropped is better than anything kept
        worst = probs.masked_fill(mask == 0, torch.inf).amin(1)
        assert (probs.masked_fill(mask == 1, -torch.inf).amax(1) <= worst).all()
    kept, dropped = kept_and_dropped(decision)
    assert torch.equal(kept, mask.flatten().nonzero().squeeze(1))
    assert torch.equal(dropped, (mask == 0).flatten().nonzero().squeeze(1))
    sampled = sample_decision(log_probs, hw, ratio, selector, exact=True).mask
    assert sampled.sum(1).tolist() == [num_kept(n, ratio)] * len(mask)


@st.composite
def convolutions(draw):
    """Draw maps, weights and arguments, some of which take Winograd's form."""
    seed, groups = draw(SEEDS), draw(one_of(1, 1, 1, 2))
    channels, outs = draw(one_of(8, 96, 100, 128)), draw(one_of(6, 96, 102))
    kernel = draw(one_of(3, 3, 3, 1, (3, 1)))
    shape = (outs, channels // groups, *((kernel,) * 2 if isinstance(kernel, int) else kernel))
    weight = normal(seed, *shape) * prod(shape[1:]) ** -0.5
    x = normal(
        seed + 1, draw(BATCHES), channels, draw(st.integers(5, 60)), draw(st.integers(5, 60))
    )
    arguments = dict(
        bias=normal(seed + 2, outs) if draw(BOOLS) else None,
        stride=draw(one_of(1, 1, 1, 2)),
        padding=draw(one_of(0, 1, 2, (1, 1), (0, 1))),
        dilation=draw(one_of(1, 1, 1, 2)),
        groups=groups,
    )
    if draw(BOOLS):
        x = x.contiguous(memory_format=torch.channels_last)
    return x, weight, arguments


@given(convolutions())
@torch.no_grad()
def test_convolutions_are_those_of_torch(case):
    x, weight, arguments = case
    exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    expected = F.conv2d(x.double(), weight.double(), **exact).float()
    same(conv2d(x, weight, **arguments), expected)
