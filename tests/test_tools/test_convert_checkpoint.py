from collections.abc import Callable
from pathlib import Path

import torch


def test_convert_checkpoint(load_tool: Callable, tmp_path: Path, fails: Callable) -> None:
    tool = load_tool('model_converters/convert_checkpoint.py')
    src, dst = tmp_path / 'src.pth', tmp_path / 'new' / 'dst.pth'
    weights = {'patch_embed.projection.weight': torch.ones(4, 3, 4, 4)}
    torch.save(dict(state_dict=weights), src)
    tool.main([str(src), str(dst), '--source', 'mmseg'])
    assert torch.load(dst)['state_dict'].keys() == weights.keys()
    name = 'model_converters/convert_checkpoint.py'
    assert "invalid choice: 'keras'" in fails(name, src, dst, '--source', 'keras')
    assert 'src must be an existing' in fails(name, tmp_path / 'no.pth', dst, '--source', 'swin')
