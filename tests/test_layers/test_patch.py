import pytest
import torch

from mmdynsparse.layers import PatchEmbed, PatchMerging


@pytest.mark.parametrize('hw', [(32, 32), (33, 30), (4, 4), (1, 3)])
def test_patch_embed_equals_mmseg(hw):
    embed = pytest.importorskip('mmseg.models.utils').PatchEmbed
    theirs = embed(3, 8, kernel_size=4, stride=4, norm_cfg=dict(type='LN'))
    ours = PatchEmbed(3, 8, 4, dict(type='LN'))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, *hw)
    (a, hw_a), (b, hw_b) = theirs(x), ours(x)
    assert hw_a == hw_b
    torch.testing.assert_close(b, a)


@pytest.mark.parametrize('hw', [(8, 8), (7, 10), (1, 1), (1, 6)])
@pytest.mark.parametrize('stride', [1, 2, 3])
def test_patch_merging_equals_mmseg(hw, stride):
    merging = pytest.importorskip('mmseg.models.utils.embed').PatchMerging
    theirs = merging(6, 12, stride=stride)
    ours = PatchMerging(6, 12, stride, dict(type='LN'))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, hw[0] * hw[1], 6)
    (a, hw_a), (b, hw_b) = theirs(x, hw), ours(x, hw)
    assert hw_a == hw_b
    torch.testing.assert_close(b, a)
