"""What a backbone with gates costs, in multiply-adds or in measured time (SPViT).

Source of the cost by gates: He et al., *Pruning Self-attentions into Convolutional Layers in Single
Path* (arXiv 2111.11802). Tables of measured time in its place are our own, after the latency models
of SparseViT and LAUDNet.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.dist import broadcast_object_list, is_main_process
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from ..layers import BottleneckConv, GatedFFN, SinglePathMixer
from ..models.geometry import Geometry
from ..models.pruning import Pruning
from ..ops import (
    MIXER_LETTERS,
    MIXERS,
    chosen_mixer,
    cost_gates,
    ffn_macs,
    gated_cost,
    mixer_macs,
    open_gates,
)

# Seconds that each part is timed for at least.
MIN_RUN_TIME = 0.5


class StageCost(NamedTuple):
    """Costs of the blocks of one stage: GMACs or ms."""

    mixers: dict[str, float]  # of each of ops.MIXERS
    ffn: float  # of an FFN without hidden units
    unit: float  # of each hidden unit


class CostTable(NamedTuple):
    """Costs of a backbone for one image: GMACs or ms."""

    stages: list[StageCost]
    rest: float  # what has no gates


class GatedBlock(NamedTuple):
    """The gates of a block that an output depends on."""

    stage: int
    mixer: SinglePathMixer
    ffn: GatedFFN


def gated_blocks(backbone: nn.Module) -> list[GatedBlock]:
    """Return the blocks with gates of a backbone, in order, up to its last output."""
    pruning: Pruning | None = getattr(backbone, 'pruning', None)
    if pruning is None or not pruning.search:
        return []
    mixers = [m for m in backbone.modules() if isinstance(m, SinglePathMixer)]
    ffns = [m for m in backbone.modules() if isinstance(m, GatedFFN)]
    geometry: Geometry = backbone.geometry
    places = [(i, j) for i, depth in enumerate(geometry.depths) for j in range(depth)]
    blocks = zip(places, mixers, ffns, strict=True)
    return [GatedBlock(i, mixer, ffn) for (i, j), mixer, ffn in blocks if j < geometry.run[i]]


def macs_table(geometry: Geometry, hw: tuple[int, int]) -> CostTable:
    """Return the costs in GMACs, as ``count_macs`` counts them, for an image size in px."""
    stages = [
        StageCost({k: v / 1e9 for k, v in mixer_macs(s).items()}, 0.0, ffn_macs(s) / 1e9)
        for s in geometry.shapes(hw)
    ]
    return CostTable(stages, geometry.rest_macs(hw) / 1e9)


def latency_table(backbone: nn.Module, hw: tuple[int, int], path: Path) -> CostTable:
    """Return the costs in ms, measured once on the device of the backbone.

    The first process measures; the others get its table. It is written to a file, and read from
    there by a training that is resumed on the same device.

    Args:
        backbone: The backbone with gates.
        hw: Size of the image, in px.
        path: File of the table.
    """
    device = next(backbone.parameters()).device
    name = 'cpu' if device.type == 'cpu' else torch.cuda.get_device_name(device)
    setting = dict(device=name, threads=torch.get_num_threads(), shape=list(hw))
    box = [None]
    if is_main_process():
        known = json.loads(path.read_text()) if path.is_file() else {}
        if known.get('setting') != setting:
            known = dict(setting=setting, **_measure(backbone, hw)._asdict())
            known['stages'] = [stage._asdict() for stage in known['stages']]
            path.write_text(json.dumps(known, indent=2))
        box = [known]
    broadcast_object_list(box)
    return CostTable([StageCost(**stage) for stage in box[0]['stages']], box[0]['rest'])


def cost_of_gates(blocks: Sequence[GatedBlock], table: CostTable) -> Tensor:
    """Return the cost of the architecture that the gates choose, with a gradient for them."""
    total = table.rest
    for block in blocks:
        stage = table.stages[block.stage]
        units = cost_gates(block.ffn.gate_logits).sum()
        mixer = gated_cost(cost_gates(block.mixer.gate_logits), stage.mixers)
        total = total + mixer + stage.ffn + stage.unit * units
    return total


def dense_cost(blocks: Sequence[GatedBlock], table: CostTable) -> float:
    """Return the cost with all gates open."""
    stages = [(table.stages[b.stage], len(b.ffn.gate_logits)) for b in blocks]
    return table.rest + sum(s.mixers['msa'] + s.ffn + s.unit * units for s, units in stages)


def lowest_cost(blocks: Sequence[GatedBlock], table: CostTable) -> float:
    """Return the cost without attentions and with one hidden unit in each FFN."""
    stages = (table.stages[block.stage] for block in blocks)
    return table.rest + sum(min(s.mixers.values()) + s.ffn + s.unit for s in stages)


@torch.no_grad()
def spread_units(blocks: Sequence[GatedBlock], width: float) -> None:
    """Give the hidden units of each FFN different logits, in the order of their norms.

    The norm of a unit is that of its row of the first layer times that of its column of the second
    one. The logits become evenly spaced around their mean, from ``width`` below to ``width`` above.
    FFNs whose logits already differ, as after a search, stay.

    Args:
        blocks: From ``gated_blocks``.
        width: Largest distance from the mean.
    """
    for block in blocks:
        logits, ((fc, *_), last, *_) = block.ffn.gate_logits, block.ffn.layers
        if (logits == logits[0]).all():
            norms = fc.weight.norm(dim=1) * last.weight.norm(dim=0)
            places = torch.linspace(-width, width, len(norms)).to(logits)
            logits[norms.argsort()] += places


@torch.no_grad()
def meet_cost(blocks: Sequence[GatedBlock], table: CostTable, goal: float) -> float:
    """Shift all gate logits by one number, so that the architecture costs what is wanted.

    The order of the gates stays. Where a single attention is too large a step, only the hidden
    units are shifted for the rest.

    Args:
        blocks: From ``gated_blocks``.
        table: Costs.
        goal: The cost, in the unit of the table, between ``lowest_cost`` and ``dense_cost``.

    Returns:
        The cost that is reached. It differs where many gates have the same logit.
    """
    mixers, units = ([getattr(b, part).gate_logits for b in blocks] for part in ('mixer', 'ffn'))
    for logits in ([*mixers, *units], units):
        _shift(logits, lambda: float(cost_of_gates(blocks, table)), goal)
    return float(cost_of_gates(blocks, table))


def _shift(logits: Sequence[Tensor], cost: Callable[[], float], goal: float) -> None:
    """Shift logits by the number, of those where the cost crosses a goal, that comes nearest."""
    starts = [x.clone() for x in logits]

    def cost_at(shift: float) -> float:
        for x, start in zip(logits, starts, strict=True):
            x.copy_(start + shift)
        return cost()

    reach = 1 + max(float(x.abs().max()) for x in starts)
    low, high = -reach, reach  # all closed, all open
    while high - low > 1e-6 * reach:
        middle = (low + high) / 2
        low, high = (middle, high) if cost_at(middle) < goal else (low, middle)
    cost_at(min((low, high), key=lambda shift: abs(cost_at(shift) - goal)))


def architecture(blocks: Sequence[GatedBlock]) -> tuple[list[list[str]], list[list[int]]]:
    """Return ``mixers`` and ``hidden`` of the architecture that the gates choose."""
    mixers, hidden = {}, {}
    for block in blocks:
        mixers.setdefault(block.stage, []).append(chosen_mixer(block.mixer.gate_logits.detach()))
        units = int(open_gates(block.ffn.gate_logits.detach()).sum())
        hidden.setdefault(block.stage, []).append(units)
    return list(mixers.values()), list(hidden.values())


def as_string(mixers: Sequence[Sequence[str]]) -> str:
    """Return one letter for each block: M, 3, 1 or -."""
    return ' '.join(''.join(MIXER_LETTERS[mixer] for mixer in stage) for stage in mixers)


@torch.no_grad()
def _measure(backbone: nn.Module, hw: tuple[int, int]) -> CostTable:
    """Time the parts of each stage in eval mode, the norm before an attention included."""
    modes = {module: module.training for module in backbone.modules()}
    for module in modes:
        module.training = False
    try:
        stages, blocks = [], gated_blocks(backbone)
        for i, shape in enumerate(backbone.geometry.shapes(hw)):
            block = next((b for b in blocks if b.stage == i), None)
            if block is None:
                continue
            weight = block.mixer.gate_logits
            x = weight.new_zeros(1, shape.tokens, shape.channels).normal_()
            stages.append(_measure_stage(block, x, backbone.geometry.maps(hw)[i]))
        table = CostTable(stages, 0.0)
        image = weight.new_zeros(1, backbone.geometry.in_channels, *hw)
        whole = _ms(partial(backbone, image))
    finally:
        for module, mode in modes.items():
            module.training = mode
    mixers, _ = architecture(blocks)
    gated, counts = 0.0, [0] * len(stages)
    for block in blocks:
        j, stage = counts[block.stage], stages[block.stage]
        counts[block.stage] += 1
        gated += stage.mixers[mixers[block.stage][j]] + stage.ffn
        gated += stage.unit * len(block.ffn.gate_logits)  # gates do not narrow it yet
    return table._replace(rest=max(whole - gated, 0.0))


def _measure_stage(block: GatedBlock, x_BTC: Tensor, hw: tuple[int, int]) -> StageCost:
    mixer, channels, first = block.mixer, x_BTC.shape[2], x_BTC.shape[1] - hw[0] * hw[1]
    norm = nn.LayerNorm(channels).to(x_BTC)
    open_all = x_BTC.new_tensor([0.0, 0.0, 1.0])
    times = dict(none=0.0, msa=_ms(lambda: mixer(norm(x_BTC), hw, open_all)))
    for name, size in (('conv1', 1), ('conv3', 3)):
        conv = BottleneckConv(channels, len(mixer.head_logits), size, dict(type='BN'))
        conv = conv.to(x_BTC).eval()
        times[name] = _ms(lambda conv=conv: conv(norm(x_BTC)[:, first:], hw))
    (fc, act, _), last, _ = block.ffn.layers
    units = fc.out_features

    def ffn(units: int) -> None:
        hidden = nn.functional.linear(norm(x_BTC), fc.weight[:units], fc.bias[:units])
        nn.functional.linear(act(hidden), last.weight[:, :units], last.bias)

    half, full = _ms(partial(ffn, units // 2)), _ms(partial(ffn, units))
    unit = max((full - half) / (units - units // 2), 0.0)
    return StageCost({name: times[name] for name in MIXERS}, max(full - unit * units, 0.0), unit)


def _ms(function: Callable[[], object]) -> float:
    """Return the median time of a call, in ms."""
    timer = Timer(
        'function()', globals=dict(function=function), num_threads=torch.get_num_threads()
    )
    return 1000 * timer.blocked_autorange(min_run_time=MIN_RUN_TIME).median
