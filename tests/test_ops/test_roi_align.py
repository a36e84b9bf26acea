"""RoIAlign as matrix products against mmcv's."""

import pytest
import torch

from mmdynsparse.ops.roi_align import roi_align

ops = pytest.importorskip('mmcv.ops')


def regions(n=40):
    """Regions of all sizes: beyond the map, as wide as it, thin, and without an area."""
    torch.manual_seed(0)
    image = torch.randint(2, (n, 1)).float()
    corner = torch.rand(n, 2) * 160 - 30
    sides = torch.exp(torch.rand(n, 2) * 6)
    special = torch.tensor(
        [
            *(
                [0, 0.0, 0, 128, 96],
                [1, 20, 20, 20, 20],
                [0, 10, 5, 300, 6],
                [1, -90, -90, -50, -50],
            ),
            *([0, 127, 95, 128, 96], [1, 500, 500, 600, 600], [0, -3.9, -3.9, 2, 2]),
        ]
    )
    return torch.cat((torch.cat((image, corner, corner + sides), 1), special))


@torch.no_grad()
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('sampling_ratio', [0, 2])
@pytest.mark.parametrize('output_size', [(7, 7), (14, 14), (3, 5)])
def test_values_are_those_of_mmcv(output_size, sampling_ratio, aligned):
    x, rois = torch.randn(2, 8, 24, 32), regions()
    layer = ops.RoIAlign(output_size, 0.25, sampling_ratio, aligned=aligned)
    out = roi_align(x, rois, output_size, 0.25, sampling_ratio, aligned)
    torch.testing.assert_close(out, layer(x, rois), atol=1e-5, rtol=1e-4)
    nhwc = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(
        roi_align(nhwc, rois, output_size, 0.25, sampling_ratio, aligned), out
    )


def test_no_regions():
    assert roi_align(torch.randn(1, 8, 4, 4), torch.zeros(0, 5), (7, 7), 0.25).shape == (0, 8, 7, 7)
