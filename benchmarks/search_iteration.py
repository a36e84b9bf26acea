"""What an iteration of a search (SPViT) costs beside one of the dense model.

    python benchmarks/search_iteration.py CONFIG --rounds 5 --out FILE

Both models take turns on the first batch of the config's data, in whole training steps: forward,
losses, backward and the optimizer's step. The search runs with its hook.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from mmengine.config import Config, ConfigDict
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, MODELS, init_default_scope
from mmengine.runner import Runner

from mmdynsparse.analysis import compare_latency
from mmdynsparse.analysis.environment import environment
from mmdynsparse.analysis.report import print_setting, print_table, write_json
from mmdynsparse.utils.command_line.cpu import adapt_to_cpu


def main() -> None:
    """Time both, print the table and write it as JSON."""
    args = parse_args()
    cfg = Config.fromfile(args.config)
    cfg.launcher = 'none'
    adapt_to_cpu(cfg)
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    batch = next(iter(Runner.build_dataloader(cfg.train_dataloader, seed=0)))
    with tempfile.TemporaryDirectory() as folder:
        steps = dict(dense=dense_step(cfg, batch), search=search_step(cfg, batch, folder))
        latency = compare_latency(steps, args.rounds, warmup=1)
    dense = latency['dense'].median
    rows = [
        dict(model=name, **{k: getattr(v, k) for k in ('median', 'p10', 'p90')})
        for name, v in latency.items()
    ]
    for row in rows:
        row['over_dense'] = row['median'] / dense
    setting = environment(torch.device('cpu')) | dict(
        config=args.config.name, batch=len(batch['inputs']), rounds=args.rounds
    )
    print_setting(setting)
    lines = [[r['model'], f'{r["median"]:.0f}', f'{r["over_dense"]:.2f} x'] for r in rows]
    print_table('one training iteration', ['model', 'median ms', 'over dense'], lines)
    if args.out:
        write_json(dict(setting=setting, rows=rows), args.out)


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('config', type=Path, help='config of a search')
    parser.add_argument('--rounds', type=int, default=5, help='timed iterations of each')
    parser.add_argument('--out', type=Path, help='JSON file for the numbers')
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f'--rounds must be at least 1, got {args.rounds}')
    return args


def dense_step(cfg: Config, batch: dict) -> Callable[[], object]:
    """An iteration of the model without gates."""
    backbone = dict(cfg.model.backbone, pruning=None)
    model = MODELS.build(dict(cfg.model, backbone=backbone)).train()
    optim = dict(cfg.optim_wrapper, constructor='DefaultOptimWrapperConstructor')
    optim['paramwise_cfg'] = {
        k: v for k, v in optim.get('paramwise_cfg', {}).items() if k != 'pretrained_lr_mult'
    }
    wrapper = build_optim_wrapper(model, ConfigDict(optim))
    return torch.enable_grad()(lambda: model.train_step(batch, wrapper))


def search_step(cfg: Config, batch: dict, work_dir: str) -> Callable[[], object]:
    """An iteration of the search, with all gates open at first."""
    model = MODELS.build(cfg.model).train()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    hooks = [HOOKS.build(hook) for hook in cfg.custom_hooks]
    runner = SimpleNamespace(model=model, work_dir=work_dir, optim_wrapper=wrapper)
    for hook in hooks:
        hook.before_train(runner)
    return torch.enable_grad()(lambda: model.train_step(batch, wrapper))


if __name__ == '__main__':
    main()
