"""Shows in one run what only a GPU can show: that everything works there, and how fast it is.

Each step runs in a process of its own and leaves a JSON file in ``--out``; a second run does what
is missing. With ``--device cpu`` the same steps run small, which shows that they work.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from torch import Tensor, nn

from mmdynsparse import registry  # noqa: F401, tells mmengine where mmdynsparse:: is
from mmdynsparse.analysis.environment import environment
from mmdynsparse.analysis.execution import forwards
from mmdynsparse.analysis.images import image_batch
from mmdynsparse.analysis.report import print_table, write_json
from mmdynsparse.models.decider import deciders
from mmdynsparse.utils.command_line.arguments import ToolParser, at_least
from mmdynsparse.utils.command_line.cpu import BFloat16OptimWrapper

ROOT = Path(__file__).resolve().parents[1]
# Small models that together have every sparse part.
SMALL = {
    'swin, UPerHead': 'sparse_heads/sparse-swin-n_sparse-upernet_1xb8-2k_camvid-256x256.py',
    'resnet, UPerHead': 'sparse_heads/sparse-upernet_sparse-r50-n_1xb8-2k_camvid-256x256.py',
    'convnext': 'sparse_convnext/sparse-convnext-n_upernet_1xb8-2k_camvid-256x256.py',
    'vit': 'sparse_vit/sparse-vit-n_mln_upernet_1xb8-2k_camvid-256x256.py',
    'swin, FPN, RPN': 'sparse_heads/mask-rcnn_sparse-swin-n_sparse-fpn_1xb2-2k_camvid.py',
}
# Models that are timed, and their parts: RoI heads need mmcv's CUDA ops.
TIMED = {
    'upernet_swin-t': ('sparse-swin-t_sparse-upernet_8xb2-160k_ade20k-512x512.py', 'whole'),
    'upernet_swin-s': ('sparse-swin-s_sparse-upernet_8xb2-160k_ade20k-512x512.py', 'whole'),
    'upernet_r50': ('sparse-upernet_sparse-r50_4xb4-160k_ade20k-512x512.py', 'whole'),
    'mask-rcnn_swin-t': ('mask-rcnn_sparse-swin-t_sparse-fpn_1x_coco.py', 'backbone', 'neck'),
}
TESTS = (
    'tests/test_ops',
    'tests/test_models/test_backbones/test_compile.py',
    'tests/test_analysis',
)
TOLERANCE = 1e-3  # of the largest value, between float32 forms without TF32


class NotHereError(Exception):
    """A step cannot be done here; the message says why."""


def build(name: str, device: str, selector: str = 'random') -> nn.Module:
    """Build one of ``SMALL`` with random weights.

    Rounding does not change random decisions, the default, when the generator is seeded.
    """
    cfg = Config.fromfile(ROOT / 'configs' / SMALL[name])
    init_default_scope(cfg.default_scope)
    model = cfg.model
    for part in (model, model.backbone):
        part.pop('init_cfg', None)
        part.pop('pretrained', None)
    for part in ('backbone', 'neck', 'decode_head'):
        if 'sparsity' in model.get(part, {}):
            model[part].sparsity['selector'] = selector
    for part in ('decode_head', 'auxiliary_head'):
        if part in model:
            model[part].norm_cfg = dict(type='BN')
    torch.manual_seed(0)
    return MODELS.build(model).to(device)


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return what the sparse parts of a model give: maps, logits, class scores of proposals."""
    maps = model.backbone(x)
    outs = list(maps)
    if getattr(model, 'neck', None) is not None:
        maps = model.neck(maps)
        outs += maps
    if hasattr(model, 'decode_head'):
        outs.append(model.decode_head(maps))
    elif hasattr(model, 'rpn_head'):
        outs += [y for level in model.rpn_head(maps) for y in level]
    return [out for out in outs if isinstance(out, Tensor)]


def error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference, as a share of the largest finite value of each tensor."""
    errors = []
    for one, other in zip(actual, expected, strict=True):
        if not torch.equal(one.isfinite(), other.isfinite()):
            return float('inf')
        finite = other.isfinite()
        size = other[finite].abs().max().clamp(min=1e-6)
        errors.append(((one - other)[finite].abs().max() / size).item())
    return max(errors)


def check(errors: dict[str, float]) -> dict:
    """Return a result that has failed if an error is above the tolerance."""
    worst = max(errors.values())
    return dict(ok=worst <= TOLERANCE, summary=f'largest error {worst:.1e}', errors=errors)


def run(command: Sequence[object]) -> str:
    """Run a Python program in the root of the project; a failure is an error with its last words.

    Raises:
        RuntimeError: If it fails.
    """
    command = [sys.executable, *map(str, command)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError((result.stdout + result.stderr)[-2000:])
    return result.stdout


def tests(device: str, out: Path) -> dict:
    """The tests of ops, compiled backbones and analysis, those for CUDA included."""
    if not (ROOT / 'tests').is_dir():
        raise NotHereError('this installation has no tests')
    paths = TESTS if device == 'cuda' else ('tests/test_ops/test_rows.py',)
    lines = run(['-m', 'pytest', '-q', '-p', 'no:cacheprovider', *paths]).strip().splitlines()
    return dict(ok=True, summary=lines[-1])


@torch.no_grad()
def executions(device: str, out: Path) -> dict:
    """Masked and gathered execution of the same decision give the same, in every part."""
    errors, x = {}, torch.randn(2, 3, 128, 192, device=device)
    for name in SMALL:
        model, outs = build(name, device).eval(), []
        for execution in ('masked', 'gather'):
            for decider in deciders(model).values():
                decider.execution = execution
            torch.manual_seed(1)
            outs.append(outputs(model, x))
        errors[name] = error(*outs)
    return check(errors)


def kernels(device: str, out: Path) -> dict:
    """The Triton kernels equal their torch form."""
    if device != 'cuda':
        raise NotHereError('Triton kernels need CUDA')
    script = ROOT / 'benchmarks' / 'gpu_kernels.py'
    for dtype in ('fp32', 'bf16', 'fp16'):
        run([script, '--dtype', dtype, '--rounds', 10, '--out', out / f'kernels_{dtype}_rows.json'])
    return dict(ok=True, summary='fp32, bf16 and fp16 agree')


def batches(hw: tuple[int, int], classes: int, count: int) -> Iterator[dict]:
    """Make batches of two images with labels."""
    for i in range(count):
        batch = image_batch(2, hw, 'mmseg', seed=i)
        for data in batch['data_samples']:
            data.gt_sem_seg = PixelData(data=torch.randint(0, classes, (1, *hw)))
        yield batch


def train(model: nn.Module, wrapper: OptimWrapper, iters: int) -> tuple[int, bool]:
    """Train a segmentor; returns how many losses were not finite, and if the weights are."""
    module = getattr(model, 'module', model)
    classes, bad = module.decode_head.num_classes, 0
    for batch in batches((128, 128), classes, iters):
        bad += not torch.isfinite(model.train_step(batch, wrapper)['loss']).item()
    return bad, all(p.isfinite().all().item() for p in module.parameters())


def autocast(device: str, out: Path) -> dict:
    """Mixed precision trains 200 iterations without NaN."""
    iters, counts = (200 if device == 'cuda' else 2), {}
    for dtype in ('bfloat16', 'float16') if device == 'cuda' else ('bfloat16',):
        for name in list(SMALL)[:4]:
            model = build(name, device).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
            if device == 'cuda':
                wrapper = AmpOptimWrapper(optimizer=optimizer, dtype=dtype)
            else:
                wrapper = BFloat16OptimWrapper(optimizer)
            counts[f'{name}, {dtype}'] = train(model, wrapper, iters)
    ok = all(bad == 0 and finite for bad, finite in counts.values())
    return dict(ok=ok, summary=f'{iters} iterations, {len(counts)} models', not_finite=counts)


def process_group(device: str, out: Path) -> dict:
    """Distributed training in one process, over nccl or, on a CPU, gloo."""
    from mmengine.model import MMDistributedDataParallel

    backend = 'nccl' if device == 'cuda' else 'gloo'
    store = dist.HashStore()
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    model = MMDistributedDataParallel(
        build('swin, UPerHead', device).train(),
        device_ids=[0] if device == 'cuda' else None,
        broadcast_buffers=False,
    )
    wrapper = OptimWrapper(torch.optim.AdamW(model.parameters(), lr=1e-4))
    bad, finite = train(model, wrapper, 3)
    dist.destroy_process_group()
    return dict(ok=bad == 0 and finite, summary=f'{backend}, 3 iterations')


@torch.no_grad()
def graphs(device: str, out: Path) -> dict:
    """Compiled backbones, and those in CUDA graphs, give what eager ones do."""
    errors, x = {}, torch.randn(1, 3, 128, 192, device=device)
    for name in list(SMALL)[:4] if device == 'cuda' else ['convnext']:
        backbone = build(name, device, 'topk').eval().backbone
        expected = [y.clone() for y in backbone(x)]
        for mode in ('compile', 'cudagraph') if device == 'cuda' else ('compile',):
            forward = forwards([backbone], mode)[backbone]
            errors[f'{name}, {mode}'] = error(forward(x), expected)
    return check(errors)


@torch.no_grad()
def synchronizations(device: str, out: Path) -> dict:
    """Inference never waits for the device."""
    if device != 'cuda':
        raise NotHereError('only CUDA has them')
    counts, x = {}, torch.randn(2, 3, 128, 192, device=device)
    for name in SMALL:
        model = build(name, device).eval()
        outputs(model, x)  # what is made once for a shape may wait
        torch.cuda.set_sync_debug_mode('warn')
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            outputs(model, x)
        torch.cuda.set_sync_debug_mode('default')
        counts[name] = sum('synchroniz' in str(warning.message) for warning in caught)
    return dict(ok=not any(counts.values()), summary=f'{sum(counts.values())}', counts=counts)


def latency(device: str, out: Path, name: str, mode: str) -> dict:
    """Dense and sparse model, bf16, batch 1 and 8 (on a CPU: fp32, batch 1, small)."""
    if mode == 'cudagraph' and device != 'cuda':
        raise NotHereError('only CUDA has graphs')
    config, *parts = TIMED[name]
    folder = out / f'latency_{name}_{mode}'
    size = [*('--dtype', 'bf16', '--batch-sizes', 1, 8, '--rounds', 20)]
    if device != 'cuda':
        size = ['--sizes', 64, '--rounds', 1, '--warmup', 0]
    tool = ROOT / 'tools' / 'analysis_tools' / 'benchmark.py'
    config = ROOT / 'configs' / 'sparse_heads' / config
    run(
        [
            tool,
            config,
            '--parts',
            *parts,
            '--device',
            device,
            '--mode',
            mode,
            *size,
            '--out',
            folder,
        ]
    )
    rows = json.loads((folder / 'benchmark.json').read_text())['rows']
    sparse = [row for row in rows if row['model'] != 'dense']
    texts = [f'{row["part"]} b{row["batch"]} {row["speed_up"]:.2f} x' for row in sparse]
    return dict(ok=True, summary=', '.join(texts))


STEPS: dict[str, Callable[[str, Path], dict]] = {
    step.__name__: step
    for step in (tests, executions, kernels, autocast, process_group, graphs, synchronizations)
}
for model_name in TIMED:
    for execution_mode in ('eager', 'compile', 'cudagraph'):
        STEPS[f'latency_{model_name}_{execution_mode}'] = (
            lambda device, out, args=(model_name, execution_mode): latency(device, out, *args)
        )


def run_step(name: str, device: str, out: Path) -> None:
    """Run a step in this process and write its file."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    start = time.monotonic()
    result = dict(step=name, **environment(torch.device(device)))
    try:
        found = STEPS[name](device, out)
        result |= dict(status='ok' if found.pop('ok') else 'FAILED', **found)
    except NotHereError as reason:
        result |= dict(status='skipped', summary=str(reason))
    except Exception as failure:
        lines = str(failure).strip().splitlines() or ['']
        text = f'{type(failure).__name__}: {lines[-1][:200]}'
        result |= dict(status='FAILED', summary=text, traceback=traceback.format_exc())
    write_json(result | dict(seconds=round(time.monotonic() - start, 1)), out / f'{name}.json')


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing of all steps, and exit with 1 if one has failed.

    Args:
        argv: Command line arguments. Defaults to None, those of the process.
    """
    parser = ToolParser(description=__doc__.split('\n')[0])
    parser.add_argument('--out', type=Path, required=True, help='folder for the results')
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda')
    parser.add_argument('--steps', nargs='+', choices=tuple(STEPS), default=tuple(STEPS))
    parser.add_argument('--seconds', type=at_least(1), default=540, help='in which no more starts')
    parser.add_argument('--here', action='store_true', help='run the steps in this process')
    args = parser.parse(argv)
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda needs a CUDA device, and torch finds none')
    out, start = args.out.resolve(), time.monotonic()
    if args.here:
        for name in args.steps:
            run_step(name, args.device, out)
        return
    for name in args.steps:
        left = args.seconds - (time.monotonic() - start)
        if left > 0 and read(name, out)['status'] in ('FAILED', 'missing'):
            print(f'{name} ...', flush=True)
            run_apart(name, args.device, out, left)
    results = [read(name, out) for name in args.steps]
    keys = ('step', 'status', 'seconds', 'summary')
    rows = [tuple(str(result[key]) for key in keys) for result in results]
    print_table('GPU check' if args.device == 'cuda' else 'GPU check, on a CPU', keys, rows)
    write_json(dict(results=results), out / 'summary.json')
    if any(result['status'] in ('FAILED', 'missing') for result in results):
        raise SystemExit(1)


def run_apart(name: str, device: str, out: Path, seconds: float) -> None:
    """Run a step in a process of its own, which a crash of the device ends alone."""
    (out / f'{name}.json').unlink(missing_ok=True)
    command = [
        sys.executable,
        __file__,
        '--out',
        out,
        '--device',
        device,
        '--steps',
        name,
        '--here',
    ]
    process = subprocess.Popen([str(x) for x in command], start_new_session=True)
    try:
        reason = f'its process ended with {process.wait(seconds)}'
    except subprocess.TimeoutExpired:
        print(f'{name} was stopped after {seconds:.0f} s; the next run begins it anew')
        return
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
        process.wait()
    if not (out / f'{name}.json').is_file():
        result = dict(step=name, status='FAILED', seconds=0.0, summary=reason)
        write_json(result, out / f'{name}.json')


def read(name: str, out: Path) -> dict:
    """Return the result of a step."""
    path = out / f'{name}.json'
    if path.is_file():
        return json.loads(path.read_text())
    return dict(step=name, status='missing', seconds=0.0, summary='no time left; run it again')


if __name__ == '__main__':
    main()
