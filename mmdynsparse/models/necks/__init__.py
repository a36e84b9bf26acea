"""Necks of detectors, for which mmdetection has to be installed."""

from .simple_feature_pyramid import SimpleFeaturePyramid
from .sparse_fpn import SparseFPN

__all__ = ['SimpleFeaturePyramid', 'SparseFPN']
