"""Export of segmentors, and of detectors up to their dense head."""

import json
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..models.decider import deciders
from .graph import BackboneGraph, DetectorGraph, SegmentorGraph
from .runtime import METADATA_KEY, PACKAGE, Metadata, fit

# Operators that run one row after the other, or that only one runtime has.
LOOPS = ('Loop', 'If', 'Scan')


def describe(graph: SegmentorGraph | DetectorGraph | BackboneGraph, meta: dict | None) -> Metadata:
    """Return what the file says of the model.

    Args:
        graph: What is exported.
        meta: ``dataset_meta`` of the checkpoint, with classes and palette; None for names by
            number and no colours.
    """
    meta, model = meta or {}, graph.model
    head = getattr(model, 'decode_head', None)
    classes = list(meta.get('classes') or ())
    palette = [list(map(int, colour)) for colour in meta.get('palette') or ()]
    if not classes and head is not None:
        classes = [str(i) for i in range(head.num_classes)]
    return Metadata(
        outputs=list(graph.outputs),
        size=graph.images.size,
        padded_size=graph.images.padded_size,
        classes=classes,
        palette=palette,
        # OpenMMLab's loaders give BGR; the graph turns it around where the model wants RGB.
        channel_order='bgr',
        align_corners=bool(getattr(head, 'align_corners', False)),
        threshold=head.threshold if getattr(head, 'out_channels', None) == 1 else None,
        keep_ratios={name: decider.keep_ratios for name, decider in deciders(model).items()},
        **graph.images.channel_statistics(),
    )


def export_model(
    graph: SegmentorGraph | DetectorGraph | BackboneGraph,
    path: str | os.PathLike,
    metadata: Metadata,
    batch: int | None = 1,
    opset: int = 20,
    calibration: Sequence[np.ndarray] = (),
) -> None:
    """Write a model to a file, of ONNX or compiled by AOTInductor.

    What is compiled is for processors like this one; it takes minutes. The file is written whole
    or not at all.

    Args:
        graph: What ``build_graph`` returns.
        path: The file, '.onnx' or '.pt2', which must not exist.
        metadata: What ``describe`` returns.
        batch: Number of images of a call, or None for any number. Defaults to 1.
        opset: Version of ONNX's operators, at least 18. Defaults to 20.
        calibration: Images (H, W, 3), uint8, as a service gets them, to quantize an ONNX file to
            8 bits. Defaults to (), which leaves it in float32.

    Raises:
        ValueError: If the file exists, an argument is out of range, what writes the file is not
            installed, AOTInductor cannot compile the graph, or it has operators that loop, or
            that are not ONNX's own.
    """
    path = check_output(path)
    if opset < 18:
        raise ValueError(f'opset must be at least 18, got {opset}')
    if calibration and path.suffix == PACKAGE:
        raise ValueError(
            f'calibration must be () for a {PACKAGE} file, got {len(calibration)} images'
        )
    images = torch.zeros(batch or 2, 3, *graph.images.size, dtype=torch.uint8)
    shapes = None if batch else dict(images={0: torch.export.Dim('batch')})
    text = json.dumps(metadata._asdict())
    partial = path.with_name(f'partial-{path.name}')
    try:
        with torch.no_grad():
            if path.suffix == PACKAGE:
                program = torch.export.export(graph, (images,), dynamic_shapes=shapes)
                _compile(program, partial, text)
            else:
                _write_onnx(graph, images, shapes, opset, partial, text)
        if calibration:
            from .quantization import quantize

            fitted = (fit(image, metadata)[0] for image in calibration)
            quantize(partial, (np.repeat(x, batch or 1, axis=0) for x in fitted))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write_onnx(
    graph: nn.Module,
    images: Tensor,
    shapes: dict | None,
    opset: int,
    path: Path,
    metadata: str,
) -> None:
    # Its optimizer warns of every Split that it leaves as it is.
    logging.getLogger('onnxscript.optimizer').setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', category=FutureWarning)
        program = torch.onnx.export(
            graph,
            (images,),
            dynamo=True,
            opset_version=opset,
            input_names=['images'],
            output_names=list(graph.outputs),
            dynamic_shapes=shapes,
            verbose=False,
        )
    check_operators([(node.domain, node.op_type) for node in program.model.graph.all_nodes()])
    program.model.metadata_props[METADATA_KEY] = metadata
    program.save(path)


def _compile(program: torch.export.ExportedProgram, path: Path, metadata: str) -> None:
    from torch._inductor.exc import InductorError, InvalidCxxCompiler  # takes seconds

    # Frozen weights are constants, which are laid out and transformed once.
    configs = {'freezing': True, 'aot_inductor.metadata': {METADATA_KEY: metadata}}
    try:
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs=configs
        )
    except (InvalidCxxCompiler, InductorError) as error:
        # A stock Swin, for one, with torch 2.11: pytorch/pytorch#179135.
        reason = ' '.join(str(error).split())[:200]
        raise ValueError(
            f'AOTInductor must find a C++ compiler and compile the model, got {reason}'
        ) from error


def check_output(path: str | os.PathLike) -> Path:
    """Check that a file may be written.

    Raises:
        ValueError: If its name does not end in '.onnx' or '.pt2', it exists, or its folder does
            not, or what writes it is not installed.
    """
    path = Path(path)
    if path.suffix not in ('.onnx', PACKAGE):
        raise ValueError(f"out must end in '.onnx' or {PACKAGE!r}, got {str(path)!r}")
    if path.exists():
        raise ValueError(f'out must not exist yet, got {str(path)!r}')
    if not path.parent.is_dir():
        raise ValueError(f'out must be in an existing folder, got {str(path)!r}')
    if path.suffix == '.onnx':
        try:
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401  (what torch.onnx needs)
        except ImportError as error:
            raise ValueError(
                'onnxscript and onnxruntime must be installed: pip install mmdynsparse[export] '
                f'(got {type(error).__name__}: {error})'
            ) from None
    return path


def check_operators(operators: Sequence[tuple[str, str]]) -> None:
    """Check the domains and types of a graph's operators.

    Raises:
        ValueError: If one loops or is not of ONNX's own domain.
    """
    wrong = {
        f'{domain}::{kind}' if domain else kind
        for domain, kind in operators
        if domain not in ('', 'ai.onnx') or kind in LOOPS or kind.startswith('Sequence')
    }
    if wrong:
        raise ValueError(
            'the exported graph must hold operators of ONNX without loops alone, '
            f'got {", ".join(sorted(wrong))}'
        )
