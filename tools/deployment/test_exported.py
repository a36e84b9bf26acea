"""Evaluates an exported model on the config's test set: mIoU of a segmentor, AP of a detector."""

from collections.abc import Sequence

from torch import nn

from mmdynsparse.deployment.evaluate import ExportedDetectorModel, ExportedSegmentorModel
from mmdynsparse.deployment.runtime import BACKENDS, ExportedSegmentor, Session
from mmdynsparse.utils.checkpoints import check_weights, read_checkpoint
from mmdynsparse.utils.command_line.arguments import ToolParser, at_least
from mmdynsparse.utils.command_line.cpu import adapt_to_cpu
from mmdynsparse.utils.command_line.data_checks import check_data, check_not_empty
from mmdynsparse.utils.command_line.errors import one_line_errors
from mmdynsparse.utils.command_line.launch import build_runner, load_config


def build_parser() -> ToolParser:
    """Returns the parser of the command line."""
    parser = ToolParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('file', help='file of export_onnx.py')
    parser.add_argument('checkpoint', nargs='?', help='of a two-stage detector, for its RoI heads')
    parser.add_argument('--backend', choices=BACKENDS, help='defaults to onnxruntime for ONNX')
    parser.add_argument('--threads', type=at_least(1), help='of a call')
    parser.add_argument('--work-dir', help='folder of logs and metrics')
    parser.add_cfg_options()
    parser.set_defaults(launcher='none', local_rank=0)
    return parser


def load_detector(model: nn.Module, path: str | None) -> nn.Module:
    """Returns the config's detector, with the weights of its RoI heads, in eval mode.

    Raises:
        ValueError: If it has RoI heads and no checkpoint, or one that does not fit.
    """
    if path is not None:
        checkpoint = read_checkpoint('checkpoint', path)
        check_weights(model, checkpoint.get('state_dict', checkpoint), path)
    elif hasattr(model, 'roi_head'):
        raise ValueError('checkpoint must be given for the RoI heads of this detector, got none')
    return model.eval()


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tool.

    Args:
        argv: Command line arguments. Defaults to None, those of the process.
    """
    args = build_parser().parse(argv)
    with one_line_errors():
        cfg = load_config(args)
        check_data(cfg, 'test')
        session = Session(args.file, args.backend, args.threads)
        is_detector = len(session.metadata.outputs) > 1
        if is_detector != (cfg.default_scope == 'mmdet'):
            kind = 'detector' if is_detector else 'segmentor'
            raise ValueError(f'file must fit the {cfg.default_scope} config, got a {kind}')
        cfg.load_from, cfg.resume = None, False
        cfg.custom_hooks = []  # they are about training, and about parts that are not there
        adapt_to_cpu(cfg)
        runner = build_runner(cfg)
        check_not_empty(runner, 'test')
        if is_detector:
            detector = load_detector(runner.model, args.checkpoint)
            runner.model = ExportedDetectorModel(session, detector)
        else:
            runner.model = ExportedSegmentorModel(ExportedSegmentor(session))
    with one_line_errors(runner):
        runner.test()


if __name__ == '__main__':
    main()
