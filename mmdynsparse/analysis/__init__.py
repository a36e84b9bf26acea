"""What a model costs beside its dense original: multiply-adds, time and memory."""

from .architecture import architecture_macs
from .dense import build_pair, dense_config
from .flops import CostMeter, count_macs
from .latency import Latency, compare_latency
from .profiling import breakdown, peak_memory

__all__ = [
    'CostMeter',
    'Latency',
    'architecture_macs',
    'breakdown',
    'build_pair',
    'compare_latency',
    'count_macs',
    'dense_config',
    'peak_memory',
]
