"""Index tensors that depend on shapes alone, made once for each shape."""

from collections.abc import Callable
from functools import wraps
from threading import Lock

import torch


def cached(function: Callable) -> Callable:
    """Keep the last 16 results of a function of shapes and, as the last argument, a device.

    Four stages need at most eight, shifted or not, so two input sizes fit. With more sizes, as in
    multi-scale training, each forward makes its tensors once and its blocks share them. Threads
    may call at the same time.

    A graph that torch.compile or torch.export traces computes its own: what is traced has no
    values to keep. Neither has what is made while a CUDA graph is captured, before the graph
    runs. A result that a captured graph reads is kept for good.
    """
    kept, lasting, lock = {}, set(), Lock()

    @wraps(function)
    def call(*args):
        if torch.compiler.is_compiling():
            return function(*args)
        capturing = _is_capturing(args[-1])
        with lock:
            if capturing and args not in kept:
                return function(*args)
            if capturing:
                lasting.add(args)
            elif args not in kept:
                # A kept tensor must also serve training after it was made under inference mode.
                with torch.inference_mode(False):
                    result = function(*args)
                if len(kept) - len(lasting) >= 16:
                    del kept[next(key for key in kept if key not in lasting)]
                kept[args] = result
            return kept[args]

    return call


def _is_capturing(device: torch.device) -> bool:
    return device.type == 'cuda' and torch.cuda.is_current_stream_capturing()
