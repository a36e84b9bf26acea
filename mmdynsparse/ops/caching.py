"""Index tensors that depend on shapes alone, made once for each shape."""

from collections.abc import Callable
from functools import wraps
from threading import Lock

import torch


def cached(function: Callable) -> Callable:
    """Keep what a function of shapes and, as the last argument, a device returned.

    A graph that torch.compile or torch.export traces computes its own: what is traced has no
    values to keep. Neither has what is made while a CUDA graph is captured, before the graph
    runs. What a captured graph reads of the kept tensors is kept for good.
    """
    kept, lasting, lock = {}, set(), Lock()

    @wraps(function)
    def call(*args):
        if torch.compiler.is_compiling():
            return function(*args)
        result = kept.get(args)
        if _is_capturing(args[-1]):
            if result is None:
                return function(*args)
            lasting.add(args)
        elif result is None:
            # A kept tensor must also serve training after it was made under inference mode.
            with torch.inference_mode(False):
                result = function(*args)
            with lock:
                # Enough for each stage and shift of two input sizes.
                if len(kept) - len(lasting) >= 16:
                    del kept[next(key for key in kept if key not in lasting)]
                kept[args] = result
        return result

    return call


def _is_capturing(device: torch.device) -> bool:
    return device.type == 'cuda' and torch.cuda.is_current_stream_capturing()
