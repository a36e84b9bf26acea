"""Parameters whose shape follows from the size of windows or images."""

import torch.nn.functional as F
from torch import Tensor


def resize_bias_table(table: Tensor, size: int) -> Tensor:
    """Resize a relative position bias table (L, heads) to ``size`` rows, bicubic in 2-D."""
    old, new = int(table.shape[0] ** 0.5), int(size**0.5)
    table_1HSS = table.t().reshape(1, -1, old, old)
    resized = F.interpolate(table_1HSS, size=(new, new), mode='bicubic')
    return resized.view(-1, size).t().contiguous()


def resize_pos_embed(
    embed_1NC: Tensor, hw: tuple[int, int], new_hw: tuple[int, int], mode: str = 'bicubic'
) -> Tensor:
    """Resize a position embedding (1, H * W, C) from ``hw`` to ``new_hw`` tokens."""
    if hw == new_hw:
        return embed_1NC
    embed_1CHW = embed_1NC.unflatten(1, hw).permute(0, 3, 1, 2)
    resized = F.interpolate(embed_1CHW, size=new_hw, mode=mode, align_corners=False)
    return resized.flatten(2).transpose(1, 2)
