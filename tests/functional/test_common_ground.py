"""Which pixels of two frames show the same ground."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scenes import Waves, pairs
from scipy import ndimage

from torchalign.functional import smoothing
from torchalign.functional.common_ground import fill_small_holes, shared_ground
from torchalign.functional.smoothing import block_sums, triangle_mean

SIZE = (97, 130)


@pytest.fixture(scope="module")
def cloudy():
    """Two frames of half the gain, a third of a pixel away, clouds of known outline over each; weights before."""
    data = pairs(torch.tensor([[0.3, -0.2], [-0.1, 0.3]]), SIZE, scene=Waves(1))
    moving = 0.5 * data.cube[:, 0] + 0.2
    cloud = torch.zeros(2, *SIZE, dtype=torch.bool)
    cloud[0, 10:50, 20:60] = cloud[1, 60:, 90:] = True
    generator = torch.Generator().manual_seed(0)
    moving = torch.where(cloud, 1.5 + 0.2 * torch.rand(moving.shape, generator=generator), moving)
    return moving, data.reference, cloud, torch.full((2, 48, 64), 0.5)


def test_clouds_are_found_and_ground_is_kept(cloudy):
    moving, reference, cloud, weights = cloudy
    ground = shared_ground(moving, reference, weights)  # one reference for both, an odd number of rows
    assert ground.shape == (2, *SIZE)
    assert ground.dtype == torch.bool
    assert not ground[cloud].any()
    assert ground[~cloud].float().mean() > 0.95
    for t in range(2):
        assert torch.equal(ground[t], shared_ground(moving[t], reference[0], weights[t]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38, -9999.0])
def test_what_is_not_usable_may_be_anything(cloudy, value):
    moving, reference, _, weights = cloudy
    usable = torch.ones(2, *SIZE, dtype=torch.bool)
    usable[:, 30:70, 60:100] = False
    expected = shared_ground(torch.where(usable, moving, 0.0), reference, weights, usable)
    found = shared_ground(torch.where(usable, moving, value), reference, weights, usable)
    assert torch.equal(found, expected)
    assert found[usable].float().mean() > 0.5


def test_edges_are_forgiven_half_a_pixel():
    # fields of one brightness each, and soft edges between them half a pixel apart
    random = np.random.default_rng(1)
    fields = np.roll(np.kron(random.random((6, 8)), np.ones((64, 64))), 7, 1)
    soft = ndimage.gaussian_filter(fields, 3.0, mode="wrap")
    reference, moving = (
        torch.from_numpy(ground.reshape(96, 4, 128, 4).mean((1, 3)) + 0.002 * random.standard_normal((96, 128)))
        for ground in (soft, np.roll(soft, 2, 1))
    )
    edge = (moving - reference).abs() > 0.06
    assert edge.sum() > 300
    ground = shared_ground(moving, reference, torch.full((48, 64), 0.5, dtype=torch.float64))
    assert ground[edge].double().mean() > 0.8


def test_small_holes_are_filled_from_around_and_wide_ones_are_not():
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
    image, mask = 3 * x - 2 * y, torch.ones(48, 64, dtype=torch.bool)
    mask[20, 30] = mask[40, 10] = False
    mask[4:16, 40:56] = False
    spoilt = torch.where(mask, image, -999.0)
    filled, usable = fill_small_holes(spoilt, mask)
    assert usable[20, 30]
    assert usable[40, 10]
    assert not usable[8:12, 44:52].any()
    torch.testing.assert_close(filled[20, 30], image[20, 30], atol=0.5, rtol=0)
    torch.testing.assert_close(filled[40, 10], image[40, 10], atol=0.5, rtol=0)
    assert torch.equal(filled[mask], image[mask])


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("shape", [(3, 64, 72), (2, 2, 33, 21)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_poolings_are_the_chains_of_additions(monkeypatch, shape, order, dtype):
    # those of a GPU, on the CPU
    image = torch.rand(shape, dtype=dtype)
    expected = [triangle_mean(image, order), block_sums(image, order)]
    monkeypatch.setattr(smoothing, "launches_kernels", lambda image: True)
    found = [triangle_mean(image, order), block_sums(image, order)]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(block_sums(image, 0), image)
