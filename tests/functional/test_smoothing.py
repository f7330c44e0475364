"""Means, sums and medians against SciPy and NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from torchalign.functional.smoothing import block_sums, enlarge, halve, nanmedian, triangle_mean


def image(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@pytest.mark.parametrize("order", [1, 2])
def test_triangles_are_scipys_with_the_border_repeated(order):
    values = image(2, 19, 23)
    box = np.ones(2**order) / 2**order
    triangle = np.convolve(box, box)
    expected = values.numpy()
    for axis in (1, 2):
        expected = ndimage.convolve1d(expected, triangle, axis=axis, mode="nearest")
    np.testing.assert_allclose(triangle_mean(values, order).numpy(), expected, atol=1e-12)


def test_blocks_that_are_cut_off_lie_at_the_end():
    values = image(10, 13)
    found = block_sums(values, 2)
    assert found.shape == (3, 4)
    starts = np.add.reduceat(np.add.reduceat(values.numpy(), [0, 4, 8], 0), [0, 4, 8, 12], 1)
    np.testing.assert_allclose(found.numpy(), starts, atol=1e-12)


def test_halves_of_odd_sides_count_the_last_line_twice():
    values = image(7, 9)
    even = np.pad(values.numpy(), ((0, 1), (0, 1)), mode="edge")
    expected = even.reshape(4, 2, 5, 2).mean((1, 3))
    np.testing.assert_allclose(halve(values).numpy(), expected, atol=1e-12)


def test_blocks_are_interpolated_between_their_centres():
    y, x = np.mgrid[:16, :24]
    ramp = torch.from_numpy(2.0 * x - 3.0 * y)
    means = block_sums(ramp, 2) / 16
    found = enlarge(means, 4, (16, 24))
    inside = (slice(2, -2), slice(2, -2))  # beyond the outermost centres the border is repeated
    np.testing.assert_allclose(found.numpy()[inside], ramp.numpy()[inside], atol=1e-9)


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_lower_median_of_what_is_a_number(deterministic):
    values = image(50, 12)
    values[torch.from_numpy(np.random.default_rng(1).random((50, 12)) < 0.3)] = torch.nan
    values[0] = torch.nan
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        found = nanmedian(values)
    finally:
        torch.use_deterministic_algorithms(before)
    kept = [np.sort(row[~np.isnan(row)]) for row in values.numpy()[1:]]
    assert {len(row) % 2 for row in kept} == {0, 1}
    assert found[1:].tolist() == [row[(len(row) - 1) // 2] for row in kept]
    assert found[0].isnan()
