"""Models for ONNX Runtime and OpenVINO: made from a config's model, and run without torch."""

from .runtime import ExportedSegmentor

__all__ = ['ExportedSegmentor']
