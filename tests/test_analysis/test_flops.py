import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmdynsparse.analysis import CostMeter, count_macs
from mmdynsparse.layers import LocalGlobalPredictor
from mmdynsparse.models import SparseSwinTransformer, SparseVisionTransformer
from mmdynsparse.models.decode_heads import SparseUPerHead


@pytest.mark.parametrize(
    ('module', 'shape', 'expected'),
    [
        (nn.Linear(5, 7), (3, 5), 3 * 5 * 7),
        (nn.Conv2d(8, 16, 3, padding=1), (2, 8, 10, 12), 2 * 10 * 12 * 16 * 8 * 9),
        (nn.Conv2d(8, 16, 3, padding=1, groups=4), (1, 8, 10, 10), 10 * 10 * 16 * 2 * 9),
        (nn.LayerNorm(5), (3, 5), 0),
    ],
)
def test_modules(module, shape, expected):
    assert count_macs(module, torch.randn(shape)) == expected


def test_attention_is_counted():
    query, key = torch.randn(1, 2, 10, 8), torch.randn(1, 2, 6, 8)
    products = 2 * (2 * 10 * 6 * 8)
    assert count_macs(F.scaled_dot_product_attention, query, key, key) == products
    x = torch.randn(1, 9, 16)
    attention = nn.MultiheadAttention(16, 4, batch_first=True)
    assert count_macs(attention, x, x, x) == 4 * 9 * 16 * 16 + 2 * 9 * 9 * 16


class HalfInEval(nn.Module):
    """Computes all rows in training and the first half of them in eval."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.frozen = nn.Dropout().eval()

    def forward(self, x):
        return self.linear(x if self.training else x[: len(x) // 2])


def test_only_what_is_executed_counts_and_modes_come_back():
    module = HalfInEval()
    assert count_macs(module, torch.randn(10, 4)) == 5 * 4 * 4
    assert module.training
    assert not module.frozen.training


def test_modes_come_back_after_an_error():
    module = HalfInEval()
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(RuntimeError):
        count_macs(module, torch.randn(10, 3))
    assert module.training
    assert torch.backends.mha.get_fastpath_enabled() == fastpath


class Lender(nn.Module):
    """Has a layer it does not run, one whose weight it lends, and work of its own."""

    def __init__(self):
        super().__init__()
        self.block = nn.ModuleDict(dict(inner=nn.Linear(4, 6), idle=nn.Linear(4, 4)))
        self.lent = nn.Linear(6, 2)

    def forward(self, x):
        # Not through __call__, as the heads of mmseg do.
        x = self.block['inner'].forward(x)
        return F.linear(x, self.lent.weight)


def test_modules_add_up_and_only_what_runs_counts():
    model = Lender()
    meter = CostMeter(model)
    for rows in (2, 4):
        meter.run(lambda rows=rows: model(torch.zeros(rows, 4)))
    assert meter.cost('block') == meter.cost('block.inner') == (3 * 4 * 6, 4 * 6 + 6)
    assert meter.cost('block.idle') == (0, 0)
    assert meter.cost('lent') == (3 * 6 * 2, 12)
    assert meter.cost() == (3 * (4 * 6 + 6 * 2), 30 + 12)
    assert 'forward' not in model.lent.__dict__


def test_looking_at_a_parameter_is_not_using_it():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    meter = CostMeter(model)
    meter.run(lambda: model[0](torch.zeros(model[1].weight.shape, device=model[1].bias.device)))
    assert meter.cost('1').params == 0
    assert meter.cost().params == 6


def centre_scores(model, x):
    """Shift the predictors' scores so that they keep some places and drop others."""
    predictors = [m for m in model.modules() if isinstance(m, LocalGlobalPredictor)]
    for i, predictor in enumerate(predictors):
        with torch.no_grad():
            model(x)
        seen = model.decisions[i].scores
        # Over those that a ViT still keeps.
        logits = torch.logit(seen[seen > -torch.inf].exp().double())
        predictor.fc3.bias.data[0] -= logits.median().float()


@pytest.mark.parametrize('selector', ['topk', 'threshold', 'mass'])
@pytest.mark.parametrize('batch', [1, 3])
def test_total_is_that_of_torch_on_the_gathered_execution(selector, batch):
    sparsity = dict(keep_ratio=0.6, selector=selector)
    swin = dict(embed_dims=16, depths=(1, 1, 4, 1), num_heads=(1, 2, 2, 4))
    vit = dict(embed_dims=32, num_layers=4, num_heads=2, out_indices=(1, 3))
    for model in (
        SparseSwinTransformer(**swin, sparsity=sparsity),
        SparseSwinTransformer(**swin, sparsity=dict(sparsity, attention=True)),
        SparseVisionTransformer(**vit, sparsity=sparsity),
    ):
        for parameter in model.eval().parameters():
            parameter.data.normal_(0, 0.2)
        model.execution = 'gather'
        x = torch.randn(batch, 3, 96, 128)
        centre_scores(model, x)
        meter = CostMeter(model)
        meter.run(lambda model=model, x=x: model(x))
        # torch counts nothing for fused attention on the CPU.
        with (
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            model(x)
        kept = [d.mask.mean().item() for d in model.decisions]
        assert all(0 < rate < 1 for rate in kept), kept
        total = meter.cost().macs
        assert total == pytest.approx(counter.get_total_flops() / 2, rel=0.01)
        assert total == count_macs(model, x)
        model.execution = 'masked'
        assert total < count_macs(model, x)
        children = [name for name, _ in model.named_children()]
        assert sum(meter.cost(name).macs for name in children) == pytest.approx(total, rel=0.02)


def test_attention_is_charged_for_the_windows_that_attend():
    """Half of the windows: half of the attention, charged to the attention, and of the FFN."""
    options = dict(attention=True, locations={0: (0,)}, cell_size=(7, 1, 1, 1))
    args = dict(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4))
    model = SparseSwinTransformer(**args, sparsity=dict(options, keep_ratio=0.5)).eval()
    x = torch.randn(2, 3, 112, 56)
    costs = []
    for ratio in (0.5, 1.0):
        model.set_keep_ratio(ratio)
        meter = CostMeter(model)
        meter.run(lambda: model(x))
        costs.append([meter.cost(f'stages.0.blocks.0.{part}').macs for part in ('attn', 'ffn')])
    tokens = 2 * 28 * 14
    assert costs[1][0] == tokens * (4 * 16**2 + 2 * 49 * 16)
    assert costs[0] == [cost / 2 for cost in costs[1]]


def test_executed_parameters_of_a_sparse_backbone():
    args = dict(embed_dims=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4))
    model = SparseSwinTransformer(**args, sparsity=dict(keep_ratio=0.5)).eval()
    x = torch.randn(1, 3, 64, 64)
    everything = sum(p.numel() for p in model.parameters())
    meter = CostMeter(model)
    meter.run(lambda: model(x))
    assert meter.cost().params == everything
    model.set_keep_ratio(1.0)
    dense = CostMeter(model)
    dense.run(lambda: model(x))
    idle = [n for n, _ in model.named_parameters() if '.predictors.' in n or '.fast_path.' in n]
    assert idle
    unused = sum(model.get_parameter(name).numel() for name in idle)
    assert dense.cost().params == everything - unused


@pytest.mark.parametrize('predictor', [None, dict(type='mmdynsparse.CellPredictor')])
def test_a_sparse_head_books_convolutions_on_their_layers(predictor):
    sparsity = dict(keep_ratio=0.3, predictor=predictor)
    head = SparseUPerHead(
        in_channels=[8, 16, 24, 32],
        in_index=[0, 1, 2, 3],
        channels=16,
        num_classes=3,
        norm_cfg=dict(type='BN'),
        align_corners=False,
        sparsity=sparsity,
    ).eval()
    maps = [torch.randn(1, c, s, s) for c, s in zip((8, 16, 24, 32), (64, 32, 16, 8), strict=True)]
    meter = CostMeter(head)
    meter.run(lambda: head(maps))
    layers = [name for name, _ in head.named_children()]
    assert sum(meter.cost(name).macs for name in layers) == meter.cost().macs > 0
    light = 2 * 32 * 32 * 16 * 16 * 9  # stride 8: the first level, and its share of the fusion
    assert meter.cost('fpn_bottleneck').macs > light
    assert meter.cost('lateral_convs.0').macs > 0
