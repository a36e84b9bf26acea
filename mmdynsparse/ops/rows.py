"""Rows of a table, put in their places.

Dimension letters: P rows of the table, R chosen ones, C channels.
"""

import torch
from torch import Tensor

# Rows are copied as 16-byte words; the dtype does not matter.
_WORD = torch.complex128


def plain_inference(x: Tensor) -> bool:
    """Whether ``x`` is computed on a CPU without gradients, and nothing traces how."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled():
        return False
    return x.device.type == 'cpu'


def plain_float32(x: Tensor) -> bool:
    """Whether ``x`` is float32 in ``plain_inference``, and an operator may have another form.

    A compiler chooses by itself; what is traced, or looked at by a mode such as FlopCounterMode,
    shall consist of public operators, and of those that the method speaks of.
    """
    if not plain_inference(x) or torch._C._len_torch_dispatch_stack() > 0:
        return False
    return x.dtype == torch.float32 and not torch.is_autocast_enabled('cpu')


def is_exporting() -> bool:
    """Whether torch.export traces the model."""
    # torch.compiler.is_exporting is a constant for Dynamo, true under torch.compile as well.
    if getattr(torch.compiler, '_is_exporting_flag', False):
        return True
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def shapes_may_vary(device: torch.device) -> bool:
    """Whether the shape of a tensor may depend on values, such as the number of kept windows.

    Elsewhere than on a CPU the host would wait for the device, and compiled code is static.
    """
    return device.type == 'cpu' and not torch.compiler.is_compiling()


def put_rows(table_PC: Tensor, rows_R: Tensor, values_RC: Tensor) -> None:
    """Do ``table_PC.index_copy_(0, rows_R, values_RC)`` in the form that is fastest on the device.

    On a CPU that operator moves single numbers, which takes longer than 16 bytes at once. Exported
    to ONNX it would be a ScatterElements; ``index_put_`` is one ScatterND.

    Args:
        table_PC: The table; it is changed in place.
        rows_R: int64, which rows are written.
        values_RC: What they become, in the dtype of the table.
    """
    if is_exporting():
        table_PC.index_put_((rows_R,), values_RC)
        return
    same = table_PC.dtype == values_RC.dtype
    # What is compiled must not come to ask for the memory layout.
    if plain_inference(table_PC) and same and _in_words(table_PC) and _in_words(values_RC):
        table_PC, values_RC = table_PC.view(_WORD), values_RC.view(_WORD)
    table_PC.index_copy_(0, rows_R, values_RC)


def _in_words(x: Tensor) -> bool:
    size = x.element_size()
    sizes = (x.shape[-1] * size, x.storage_offset() * size)
    return x.is_contiguous() and all(s % _WORD.itemsize == 0 for s in sizes)
