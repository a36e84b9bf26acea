"""Times a sparse model beside its dense original; the two alternate in one run."""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmdynsparse.analysis.backends import BACKENDS, backend_table, run_backends
from mmdynsparse.analysis.benchmark import Plan, run_benchmark
from mmdynsparse.analysis.dense import Pair
from mmdynsparse.analysis.detections import has_roi_head
from mmdynsparse.analysis.environment import environment
from mmdynsparse.analysis.execution import MODES
from mmdynsparse.analysis.model_parts import MODEL_PARTS, available_parts
from mmdynsparse.analysis.models import check_sizes, load_models
from mmdynsparse.analysis.report import (
    breakdown_tables,
    latency_table,
    plot_latency,
    print_setting,
    write_json,
)
from mmdynsparse.utils.command_line.arguments import (
    DTYPES,
    AnalysisParser,
    at_least,
    check_image,
    image_size,
    keep_ratio,
)
from mmdynsparse.utils.command_line.errors import keep_partial, one_line_errors

EXPORTED = ('cpu', 'fp32', 'eager', None)


def build_parser() -> AnalysisParser:
    """Returns the parser of the command line."""
    parser = AnalysisParser(description=__doc__)
    parser.add_argument(
        '--parts',
        nargs='+',
        choices=MODEL_PARTS,
        default=('backbone', 'whole'),
        help='what is timed; whole is with pre- and post-processing',
    )
    parser.add_argument(
        '--batch-sizes', nargs='+', type=at_least(1), default=(1,), help='images per call'
    )
    parser.add_argument(
        '--sizes',
        nargs='+',
        type=image_size,
        default=((512, 512),),
        metavar='H or HxW',
        help='sizes of the images in px',
    )
    parser.add_argument(
        '--keep-ratios',
        nargs='+',
        type=keep_ratio,
        default=(None,),
        metavar='R or R,R,...',
        help="numbers, or lists with one for each predictor; defaults to the config's",
    )
    parser.add_argument('--dtype', choices=tuple(DTYPES), default='fp32')
    parser.add_argument('--mode', choices=MODES, default='eager', help='of both sides')
    parser.add_argument(
        '--rounds', type=at_least(1), default=30, help='timed calls of each variant'
    )
    parser.add_argument('--warmup', type=at_least(0), default=3, help='calls before them')
    parser.add_argument(
        '--backends',
        nargs='+',
        choices=BACKENDS,
        default=(),
        help='time what is exported of the models in these; parts are backbone and whole',
    )
    parser.add_argument(
        '--detections',
        type=at_least(1),
        metavar='N',
        help='let RoI heads find N objects in each image; defaults to what the model finds',
    )
    parser.add_argument('--image', help='file of an image, which is resized; noise without one')
    return parser


def make_plan(args: argparse.Namespace, scope: str, pair: Pair) -> Plan:
    """Turns the arguments into a plan.

    Raises:
        ValueError: If an argument is not valid for this model or device.
    """
    check_sizes(args.sizes, pair)
    check_image(args.image)
    if args.backends and (args.device, args.dtype, args.mode, args.image) != EXPORTED:
        raise ValueError(
            "--backends needs --device 'cpu', --dtype 'fp32', --mode 'eager' and no --image, got "
            f'{args.device!r}, {args.dtype!r}, {args.mode!r} and {args.image!r}'
        )
    if args.backends and not set(args.parts) <= {'backbone', 'whole'}:
        raise ValueError(f'--parts must be backbone and whole with --backends, got {args.parts}')
    if args.mode == 'cudagraph' and args.device != 'cuda':
        raise ValueError("--mode 'cudagraph' needs --device 'cuda', got 'cpu'")
    if args.detections and not has_roi_head(pair.dense):
        raise ValueError(
            f'--detections needs a two-stage detector, got {args.detections} for another model'
        )
    has = available_parts(pair.sparse)
    parts = [part for part in MODEL_PARTS if part in args.parts and part in has]
    if not parts:
        raise ValueError(f'--parts must name some of {has} of this model, got {args.parts}')
    return Plan(
        scope=scope,
        parts=parts,
        batch_sizes=args.batch_sizes,
        sizes=args.sizes,
        keep_ratios=args.keep_ratios,
        device=next(pair.sparse.parameters()).device,
        dtype=DTYPES[args.dtype],
        mode=args.mode,
        rounds=args.rounds,
        warmup=args.warmup,
        image=args.image,
        seed=args.seed,
        detections=args.detections,
    )


def describe(args: argparse.Namespace, plan: Plan, pair: Pair) -> dict:
    """States how the numbers come about."""
    ratios = ['of the config' if ratio is None else ratio for ratio in plan.keep_ratios]
    return dict(
        command=shlex.join(['tools/analysis_tools/benchmark.py', *args.argv]),
        **environment(plan.device),
        dense=', '.join(pair.originals),
        weights=args.checkpoint or 'random',
        dtype=args.dtype if args.dtype == 'fp32' else f'{args.dtype} weights, autocast',
        mode=plan.mode,
        parts=', '.join(plan.parts),
        **(dict(backends=', '.join(args.backends)) if args.backends else {}),
        batch_sizes=', '.join(map(str, plan.batch_sizes)),
        sizes=', '.join(f'{h}x{w}' for h, w in plan.sizes),
        keep_ratios='; '.join(map(str, ratios)),
        input=plan.image or 'random noise',
        seed=plan.seed,
        **_detections(plan, pair),
        rounds=f'{plan.rounds} after {plan.warmup} for warming up',
        memory='torch allocations of a call at their peak, without weights and input',
    )


def _detections(plan: Plan, pair: Pair) -> dict:
    if hasattr(pair.dense, 'decode_head'):
        return {}
    return dict(detections=plan.detections or 'what the model finds, see the table')


def measure(groups: Iterator[list[dict]], result: dict, out: Path | None) -> None:
    """Collects the rows; those that were measured are written even if a later setting fails.

    Raises:
        ValueError: If a setting failed or the run was interrupted.
    """
    try:
        with keep_partial(result, lambda: f'{len(result["rows"])} rows'):
            for rows in groups:
                result['rows'] += rows
                last = rows[0]
                print(f'measured {last["part"]}, batch {last["batch"]}, {last["size"]}', flush=True)
                if out:
                    write_json(result, out / 'benchmark.json')
    finally:
        report(result, out)


def report(result: dict, out: Path | None) -> None:
    """Prints the tables and writes what there is."""
    if out:
        write_json(result, out / 'benchmark.json')
    if not result['rows']:
        return
    if 'backend' in result['rows'][0]:
        backend_table(result['rows'])
        return
    latency_table(result['rows'])
    breakdown_tables(result['rows'])
    if out:
        setting = result['setting']
        title = f'{setting["device"]}, {setting["threads"]} threads, '
        title += f'{setting["dtype"]}, {setting["mode"]}'
        plot_latency(result['rows'], out / 'latency.png', title)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tool.

    Args:
        argv: Command line arguments. Defaults to None, those of the process.
    """
    args = build_parser().parse(argv)
    args.argv = sys.argv[1:] if argv is None else list(argv)
    with one_line_errors():
        cfg, pair = load_models(args, DTYPES[args.dtype])
        plan = make_plan(args, cfg.default_scope, pair)
        result = dict(setting=describe(args, plan, pair), rows=[])
        print_setting(result['setting'])
        backends = run_backends(pair, plan, args.backends) if args.backends else None
        measure(backends or run_benchmark(pair, plan), result, Path(args.out) if args.out else None)


if __name__ == '__main__':
    main()
