"""Writes the pruned model of a search: its checkpoint and its config."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmdynsparse.models.backbones.sparse_backbone import SparseBackbone
from mmdynsparse.sparsify.config_text import child_config
from mmdynsparse.utils.checkpoints import (
    Pruned,
    architecture_of,
    convert_checkpoint,
    prune_state_dict,
    read_checkpoint,
)
from mmdynsparse.utils.command_line.arguments import ToolParser
from mmdynsparse.utils.command_line.errors import one_line_errors
from mmdynsparse.utils.command_line.launch import load_config

SEARCH_HOOK = 'SinglePathSearchHook'
CONSTRUCTOR = 'mmdynsparse.FineTuneOptimWrapperConstructor'


def build_parser() -> ToolParser:
    """Returns the parser of the command line."""
    parser = ToolParser(description=__doc__)
    parser.add_argument('config', help='config of the search')
    parser.add_argument('checkpoint', help='checkpoint of the search')
    parser.add_argument(
        '--weights',
        choices=('searched', 'original'),
        default='searched',
        help='weights to keep: those of the search, or the dense ones before it',
    )
    parser.add_argument('--original', help='dense checkpoint, for --weights original')
    parser.add_argument(
        '--source', choices=('spvit',), help="'spvit' for a checkpoint of the published SPViT"
    )
    parser.add_argument(
        '--finetune', help='config that the new one inherits; defaults to that of the search'
    )
    parser.add_argument('--out', required=True, help='folder for pruned.pth and pruned.py')
    # What load_config expects of the tools that train and test.
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0, cfg_options=None)
    return parser


def prune(args: argparse.Namespace, cfg: Config) -> tuple[Pruned, dict]:
    """Returns the pruned weights, and the ``pruning`` of their model.

    Raises:
        ValueError: If config, checkpoint and arguments do not go together.
    """
    if (args.weights == 'original') != (args.original is not None):
        raise ValueError(
            f'--original must be given with --weights original and only then, got {args.original!r}'
        )
    state = read_checkpoint('checkpoint', args.checkpoint)
    state = state.get('state_dict', state)
    if args.source:
        state = convert_checkpoint(state, args.source)
        if state._metadata[''].get('norm_identity'):
            pruned = architecture_of(state)
            return pruned, dict(mixers=pruned.mixers, hidden=pruned.hidden, norm_identity=True)
    backbone = build_backbone(cfg)
    if backbone.pruning is None or not backbone.pruning.search:
        raise ValueError(
            'config must be of a search, with pruning=dict(search=True) in its backbone, got '
            f'{cfg.model.backbone.get("pruning")}'
        )
    original = None
    if args.original:
        original = read_checkpoint('--original', args.original)
        original = original.get('state_dict', original)
    pruned = prune_state_dict(state, backbone.pruning.alpha, original)
    pruning = dict(mixers=pruned.mixers, hidden=pruned.hidden)
    if 'norm_cfg' in cfg.model.backbone.pruning:
        pruning['norm_cfg'] = dict(backbone.pruning.norm_cfg)
    return pruned, pruning


def build_backbone(cfg: Config, **changes: object) -> SparseBackbone:
    """Builds the backbone of the config, changed, without a checkpoint."""
    init_default_scope(cfg.default_scope)
    return MODELS.build({**cfg.model.backbone, 'init_cfg': None, **changes})


def check_fit(cfg: Config, pruned: Pruned, pruning: dict) -> None:
    """Loads the pruned weights into the backbone that the new config describes.

    Raises:
        ValueError: If they do not fit it.
    """
    backbone = build_backbone(cfg, pruning=pruning)
    prefix = 'backbone.' if any(k.startswith('backbone.') for k in pruned.state_dict) else ''
    named = pruned.state_dict.items()
    own = {k.removeprefix(prefix): v for k, v in named if k.startswith(prefix)}
    try:
        keys = backbone.load_state_dict(own, strict=False)
    except RuntimeError as error:
        raise ValueError(f'checkpoint must fit the backbone of the config, got {error}') from error
    if keys.missing_keys or keys.unexpected_keys:
        raise ValueError(
            f'checkpoint must fit the backbone of the config, got {len(keys.missing_keys)} missing '
            f'{keys.missing_keys[:3]} and {len(keys.unexpected_keys)} unexpected names '
            f'{keys.unexpected_keys[:3]}'
        )


def config_text(base: str, cfg: Config, pruning: dict, checkpoint: Path) -> str:
    """Returns the text of the new config: it inherits another one, and has no search."""
    hooks = [hook for hook in cfg.get('custom_hooks', []) if SEARCH_HOOK not in str(hook['type'])]
    if cfg.model.backbone.get('pruning') is not None:
        pruning = {'_delete_': True, **pruning}
    changes = dict(
        model=dict(backbone=dict(init_cfg=None, pruning=pruning)),
        load_from=str(checkpoint.resolve()),
        custom_hooks=Config(dict(x=hooks)).to_dict()['x'],
    )
    optim = cfg.get('optim_wrapper', {})
    if optim.get('constructor') == CONSTRUCTOR:
        # Without gates there are no new parameters, which that constructor is for.
        other = optim.get('paramwise_cfg', {}).get('constructor', 'DefaultOptimWrapperConstructor')
        changes['optim_wrapper'] = dict(constructor=other)
    return child_config(base, str(checkpoint.with_suffix('.py')), cfg.to_dict(), changes)


def write(out: Path, pruned: Pruned, text: str) -> None:
    """Writes both files, or none.

    Raises:
        ValueError: If one of them exists.
    """
    files = [out / 'pruned.pth', out / 'pruned.py']
    if existing := [str(path) for path in files if path.exists()]:
        raise ValueError(f'--out must not hold pruned files, got {", ".join(existing)}')
    out.mkdir(parents=True, exist_ok=True)
    drafts = [path.with_name(f'.{path.name}.part') for path in files]
    try:
        torch.save(dict(state_dict=pruned.state_dict), drafts[0])
        drafts[1].write_text(text)
        for draft, path in zip(drafts, files, strict=True):
            os.replace(draft, path)
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tool.

    Args:
        argv: Command line arguments. Defaults to None, those of the process.
    """
    args = build_parser().parse(argv)
    with one_line_errors():
        cfg = load_config(args)
        base = args.finetune or args.config
        new = load_config(argparse.Namespace(**{**vars(args), 'config': base}))
        pruned, pruning = prune(args, cfg)
        check_fit(new, pruned, pruning)
        out = Path(args.out)
        write(out, pruned, config_text(base, new, pruning, out / 'pruned.pth'))
    print(f'{out / "pruned.py"} and {out / "pruned.pth"} written')
    print(f'mixers {pruned.mixers}')
    print(f'hidden {pruned.hidden}')


if __name__ == '__main__':
    main()
