from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.feature import peak_local_max

from torchalign.functional.keypoints import (
    erode,
    highest,
    pixel_of,
    quadratic_offset,
    stretch_contrast,
    strict_maxima,
)


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -------------------------------------------------------------------------------------------------------- contrast


@pytest.mark.parametrize(("gain", "offset"), [(1.0, 0.0), (1e4, 300.0), (1e-4, -2e-4), (-3.0, 1e3)])
def test_stretch_is_the_percentiles_whatever_the_units(gain, offset):
    frames = noise(3, 90, 101, dtype=torch.float64) * gain + offset
    stretched, usable, empty = stretch_contrast(frames)
    low, high = np.quantile(frames.flatten(1).numpy(), [0.01, 0.99], axis=1, method="nearest")
    expected = ((frames.numpy() - low[:, None, None]) / (high - low)[:, None, None]).clip(0, 1)
    np.testing.assert_allclose(stretched.numpy(), expected, atol=2e-2)
    assert usable.all()
    assert not empty.any()


def test_stretch_sees_only_what_is_usable():
    frames = noise(2, 60, 60)
    usable = torch.ones(2, 60, 60, dtype=torch.bool)
    usable[:, 10:40, 5:50] = False
    expected, _, _ = stretch_contrast(frames, usable)
    spoilt = frames.clone()
    spoilt[~usable] = 1e30
    spoilt[:, 15, 20] = torch.nan
    spoilt[:, 15, 21] = -torch.inf
    for frames in (spoilt, spoilt.masked_fill(~usable, torch.nan)):
        stretched, seen, empty = stretch_contrast(frames, usable)
        assert torch.equal(stretched, expected)
        assert torch.equal(seen, usable)
        assert not empty.any()
    # without the mask, what is no number is found out
    _, seen, _ = stretch_contrast(spoilt.masked_fill(~usable, torch.nan))
    assert torch.equal(seen, usable)


def test_stretch_of_large_frames_takes_a_sample():
    frames = noise(1, 700, 520)
    stretched, _, _ = stretch_contrast(frames)
    low, high = np.quantile(frames.numpy(), [0.01, 0.99])
    np.testing.assert_allclose(stretched, ((frames - low) / (high - low)).clip(0, 1), atol=2e-2)


@pytest.mark.parametrize("value", [0.0, 7e-12, -4e4, torch.nan, torch.inf])
def test_flat_and_empty_frames_are_said_to_be(value):
    frames = torch.full((2, 32, 32), value)
    frames[1] = noise(32, 32)
    stretched, _, empty = stretch_contrast(frames)
    assert empty.tolist() == [True, False]
    assert torch.equal(stretched[0], torch.zeros(32, 32))
    assert torch.equal(stretched[1], stretch_contrast(frames[1:])[0][0]), "a neighbour changes nothing"
    # one pixel of 4096 is no image
    few = torch.zeros(1, 64, 64, dtype=torch.bool)
    few[0, 30, 30:34] = True
    assert stretch_contrast(noise(1, 64, 64), few)[2].all()


# ----------------------------------------------------------------------------------------------------------- maxima


@pytest.mark.parametrize("radius", [1, 2, 4])
def test_strict_maxima_are_those_of_scikit_image(radius):
    scores = noise(2, 33, 40, seed=radius)
    found = strict_maxima(scores, radius)
    for one, scored in zip(found, scores.numpy(), strict=True):
        expected = peak_local_max(scored, min_distance=radius, exclude_border=False, threshold_abs=-np.inf)
        # that keeps the higher of two close peaks too; ours need no second look
        footprint = ndimage.maximum_filter(scored, 2 * radius + 1, mode="constant", cval=-np.inf)
        assert {tuple(place) for place in one.nonzero().tolist()} == {
            tuple(place) for place in expected.tolist() if scored[tuple(place)] == footprint[tuple(place)]
        }


def test_plateaus_have_no_maximum():
    scores = torch.zeros(1, 9, 9)
    assert not strict_maxima(scores, 1).any()
    scores[0, 4, 4:6] = 1.0
    assert not strict_maxima(scores, 1).any()
    scores[0, 4, 5] = 1.5
    assert strict_maxima(scores, 2).nonzero().tolist() == [[0, 4, 5]]


@pytest.mark.parametrize("radius", [1, 3, 8])
def test_erosion_is_scipys(radius):
    usable = noise(20, 31) > -2.0
    expected = ndimage.binary_erosion(usable, np.ones((2 * radius + 1,) * 2), border_value=1)
    assert torch.equal(erode(usable[None], radius)[0], torch.from_numpy(expected))


def test_highest_has_always_as_many_rows():
    scores, allowed = noise(3, 50), noise(3, 50, seed=1) > 0
    allowed[2] = False
    value, index = highest(scores, allowed, 60)
    assert value.shape == index.shape == (3, 60)
    for row in range(3):
        count = int(allowed[row].sum())
        expected = scores[row][allowed[row]].sort(descending=True).values
        assert torch.equal(value[row, :count], expected)
        assert torch.equal(scores[row][index[row, :count]], expected)
        assert (value[row, count:] == -torch.inf).all()
    assert int(index.min()) >= 0
    assert int(index.max()) < 50
    assert torch.equal(highest(scores, allowed, 5)[0], value[:, :5])


# ------------------------------------------------------------------------------------------------------- sub-pixel


def test_quadratics_are_solved_exactly():
    random = torch.Generator().manual_seed(0)
    centre = torch.rand(20, 2, generator=random, dtype=torch.float64) - 0.5
    curvature = torch.rand(20, 3, generator=random, dtype=torch.float64) + 0.2
    y, x = torch.meshgrid(torch.arange(7.0) - 3, torch.arange(9.0) - 4, indexing="ij")
    dx, dy = x - centre[:, 0, None, None], y - centre[:, 1, None, None]
    a, b, c = (part[:, None, None] for part in curvature.unbind(-1))
    bumps = 3 - a * dx**2 - b * dy**2 - 0.5 * c.minimum(a.minimum(b)) * dx * dy
    index = torch.full((20, 1), 3 * 9 + 4)
    assert pixel_of(index[0], 9).tolist() == [[4, 3]]
    torch.testing.assert_close(quadratic_offset(bumps, index)[:, 0], centre, atol=1e-12, rtol=0)


def test_offsets_stay_within_the_pixel_and_are_never_nan():
    scores = torch.cat((noise(1, 24, 24), torch.zeros(1, 24, 24), noise(1, 24, 24).sign()))
    index = torch.arange(24 * 24).expand(3, -1)
    offset = quadratic_offset(scores, index)
    assert offset.isfinite().all()
    assert float(offset.abs().max()) <= 0.5
    assert torch.equal(offset[1], torch.zeros(24 * 24, 2))
    # pictures too small for a neighbourhood
    assert quadratic_offset(noise(1, 1, 2), torch.zeros(1, 1, dtype=torch.int64)).isfinite().all()
