"""What fewer proposals and light masks cost a dense detector, with nothing trained.

    python benchmarks/roi_study.py CONFIG CHECKPOINT --out FILE

The config is that of a dense Mask R-CNN and has a test set in the format of COCO. Of each image
features and proposals are computed once; each variant of the RoI head then runs on them.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import METRICS, MODELS, init_default_scope
from torch import nn

from mmdynsparse.analysis.environment import environment
from mmdynsparse.analysis.images import dataset_batches
from mmdynsparse.analysis.models import load_weights
from mmdynsparse.analysis.report import print_table, write_json
from mmdynsparse.models.decider import Decider, deciders
from mmdynsparse.models.sparsity import RegionSparsity

ALL = dict(keep_ratio=1.0)
# Sparsity of proposals and of masks.
VARIANTS = {
    'dense': (ALL, ALL),
    **{f'proposals {r}': (dict(keep_ratio=r), ALL) for r in (0.5, 0.3, 0.2, 0.1)},
    'proposals 0.3, random': (dict(keep_ratio=0.3, selector='random'), ALL),
    **{
        f'proposals, {mass} of the objectness': (dict(keep_ratio=mass, selector='mass'), ALL)
        for mass in (0.99, 0.95, 0.9)
    },
    **{f'masks {r}': (ALL, dict(keep_ratio=r)) for r in (0.5, 0.3, 0.1)},
    **{
        f'masks {r}, random': (ALL, dict(keep_ratio=r, selector='random')) for r in (0.5, 0.3, 0.01)
    },
    'proposals 0.3, masks 0.5': (dict(keep_ratio=0.3), dict(keep_ratio=0.5)),
}
METRIC_NAMES = {'coco/bbox_mAP': 'box AP', 'coco/segm_mAP': 'mask AP'}


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate all variants and write a file.

    Args:
        argv: Command line arguments. Defaults to None, those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('config', type=Path, help='config of a dense Mask R-CNN')
    parser.add_argument('checkpoint', type=Path, help='its checkpoint')
    parser.add_argument('--out', type=Path, required=True, help='JSON file of the results')
    parser.add_argument('--images', type=int, help='how many, spread evenly; defaults to all')
    args = parser.parse_args(argv)
    for name in ('config', 'checkpoint'):
        if not getattr(args, name).is_file():
            parser.error(f'{name} must be an existing file, got {getattr(args, name)}')
    if args.images is not None and args.images < 1:
        parser.error(f'--images must be at least 1, got {args.images}')
    cfg = Config.fromfile(args.config)
    init_default_scope(cfg.default_scope)
    model = build_model(cfg, args.checkpoint)
    rows = evaluate(model, cfg, args.images or 10**9)
    command = shlex.join(['benchmarks/roi_study.py', *(sys.argv[1:] if argv is None else argv)])
    setting = dict(command=command, **environment(torch.device('cpu')))
    write_json(dict(setting=setting, rows=rows), args.out)
    header = ['variant', *METRIC_NAMES.values(), 'proposals of an image', 'masks kept']
    cells = [[row['variant'], *(f'{row[key]:.2f}' for key in header[1:])] for row in rows]
    print_table('RoI heads, nothing trained', header, cells)


def build_model(cfg: Config, checkpoint: Path) -> nn.Module:
    """Build the model with sparse RoI heads, which load the dense weights."""
    roi_head = cfg.model.roi_head
    roi_head.update(type='mmdynsparse.SparseStandardRoIHead', sparsity=ALL)
    roi_head.mask_head.update(type='mmdynsparse.SparseFCNMaskHead', sparsity=ALL)
    model = MODELS.build(cfg.model).eval()
    load_weights(model, str(checkpoint))
    return model


@torch.no_grad()
def evaluate(model: nn.Module, cfg: Config, images: int) -> list[dict]:
    """Return the metrics of all variants on the config's test set."""
    metrics = {name: METRICS.build(cfg.test_evaluator) for name in VARIANTS}
    counts = {name: torch.zeros(3) for name in VARIANTS}  # proposals, masks kept, masks
    seen = 0
    for batch in dataset_batches(cfg, images):
        seen += 1
        data = model.data_preprocessor(batch, False)
        samples = data['data_samples']
        maps = model.extract_feat(data['inputs'])
        proposals = model.rpn_head.predict(maps, samples, rescale=False)
        for name, sparsities in VARIANTS.items():
            torch.manual_seed(0)  # of random decisions
            set_sparsity(model, sparsities)
            found = model.roi_head.predict(maps, proposals, samples, rescale=True)
            model.add_pred_to_datasample(samples, found)
            metrics[name].dataset_meta = cfg.test_dataloader.dataset.metainfo
            metrics[name].process(data, [sample.to_dict() for sample in samples])
            counts[name] += kept(model, len(found[0]))
    rows = []
    for name, metric in metrics.items():
        values = metric.evaluate(seen)
        row = {short: 100 * values[key] for key, short in METRIC_NAMES.items()}
        proposals, masks, detections = counts[name].tolist()
        row['proposals of an image'] = proposals / seen
        row['masks kept'] = masks / max(detections, 1)
        rows.append(dict(variant=name, **row))
    return rows


def set_sparsity(model: nn.Module, sparsities: Sequence[Mapping]) -> None:
    """Change keep ratio and selector of proposals and masks."""
    parts = deciders(model)
    for part, cfg in zip(('roi_head', 'roi_head.mask_head'), sparsities, strict=True):
        decider: Decider = parts[part]
        decider.sparsity = RegionSparsity.from_cfg(cfg)
        decider.set_keep_ratio(decider.sparsity.keep_ratio)


def kept(model: nn.Module, detections: int) -> torch.Tensor:
    """Return the numbers of kept proposals, kept masks and detections of the last image."""
    (proposals,) = model.roi_head.decider.decisions
    decider = model.roi_head.mask_head.decider
    masks = detections if decider.keeps_all() else 0
    if detections and not decider.keeps_all():
        masks = decider.decisions[0].mask.sum().item()
    return torch.tensor([proposals.mask.sum().item(), masks, detections])


if __name__ == '__main__':
    main()
