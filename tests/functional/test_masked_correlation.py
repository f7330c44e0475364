"""The correlation of weighted fields at all translations, against loops over them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from torchalign.functional.masked_correlation import best_shift


def correlation_at(shift, moving, weights, reference, other_weights):
    """(K, h, w) fields with the first moved by whole samples (x, y): their weighted correlation, and the overlap."""
    rows, columns = weights.shape
    x, y = shift
    here = np.s_[max(0, y) : rows + min(0, y), max(0, x) : columns + min(0, x)]
    there = np.s_[max(0, -y) : rows + min(0, -y), max(0, -x) : columns + min(0, -x)]
    both = weights[there] * other_weights[here]
    first, second = moving[:, there[0], there[1]], reference[:, here[0], here[1]]
    power = (both * first**2).sum() * (both * second**2).sum()
    return (both * first * second).sum() / np.sqrt(max(power, 1e-30)), both.sum()


@pytest.mark.parametrize("parts", [1, 2])
def test_is_the_best_of_all_shifts(parts):
    rng = np.random.default_rng(parts)
    scene = gaussian_filter(rng.normal(size=(parts, 40, 44)), (0, 1, 1))
    moving, reference = scene[:, :20, 3:27], scene[:, 7:27, 12:36] + 0.05 * rng.normal(size=(parts, 20, 24))
    weights, others = rng.uniform(0.2, 1, (2, 20, 24))
    weights[:6, :9], others[12:, 15:] = 0, 0
    shift, height = best_shift(
        *(torch.from_numpy(np.ascontiguousarray(image)) for image in (moving, weights, reference, others)),
        spacings=(3.0, 2.0),
        reach=100.0,
    )
    assert shift.tolist() == [-9 * 2.0, -7 * 3.0]
    heights = {
        (x, y): correlation_at((x, y), moving, weights, reference, others)
        for x in range(-20, 21)
        for y in range(-16, 17)
    }
    largest = max(overlap for _, overlap in heights.values())
    best = max(
        value * np.sqrt(overlap / largest) for value, overlap in heights.values() if overlap >= 0.2 * largest
    )
    assert height.item() == pytest.approx(best, abs=1e-9)


def test_a_longer_shift_than_expected_must_fit_better():
    field = torch.from_numpy(gaussian_filter(np.random.default_rng(0).normal(size=(24, 24)), 1))
    blank, alike = torch.zeros_like(field), torch.ones_like(field)
    # the ground is there twice, a little fainter near by
    reference = blank.clone()
    reference[:, 14:] = field[:, :10]
    reference[:, 2:12] = field[:, :10] + 0.3 * torch.randn(24, 10, generator=torch.Generator().manual_seed(1))
    moving = blank.clone()
    moving[:, :10] = field[:, :10]
    given = moving[None], alike, reference[None], alike
    both = [best_shift(*given, spacings=(1.0, 1.0), reach=reach) for reach in (5.0, 50.0)]
    assert both[0][0].tolist() == [2.0, 0.0]
    assert both[1][0].tolist() == [14.0, 0.0]


def test_nothing_in_common_is_no_error():
    blank = torch.zeros(1, 2, 16, 16)
    shift, height = best_shift(blank, blank[0], blank, blank[0], spacings=(1.0, 1.0), reach=9.0)
    assert shift.isfinite().all()
    assert height.isfinite().all()
