"""What a model costs: multiply-adds that are really executed, and wall-clock time."""

from .flops import count_macs
from .latency import Latency, compare_latency

__all__ = ['Latency', 'compare_latency', 'count_macs']
