"""Phase correlation link by link, on scenes whose shift is analytic."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from scenes import Waves, assert_derivative, fractal_stack, pairs

from torchalign.functional.common_ground import agreement
from torchalign.functional.low_pass import low_pass
from torchalign.functional.peak import coarse_peak, derivatives_at, refine_peak, wave_orders
from torchalign.functional.phase import cross_power, phase_correlation
from torchalign.functional.texture import local_contrast
from torchalign.functional.working_grid import working_size

NAN, INF = float("nan"), float("inf")
TRUTH = torch.tensor([[1.3, -0.6], [0.0, 0.0], [-2.25, 3.1], [0.5, 0.5], [-0.02, 0.03]])


@functools.lru_cache(maxsize=8)
def waves(size=(96, 104), dtype=torch.float32, **options):
    data = pairs(TRUTH, size, dtype=dtype, scene=Waves(1, **options))
    return data.cube[:, 0], data.reference[0]


@functools.lru_cache(maxsize=2)
def decimated(size=(128, 128)):
    data = fractal_stack(8, size=size, bands=1, noise=0.003)
    return data.cube[:, 0], data.reference[0], data.shift


def errors(found, truth=TRUTH):
    return (found.shift - truth.to(found.shift)).norm(dim=-1)


# --------------------------------------------------------------------------------------------------- the whole


@pytest.mark.parametrize("size", [(96, 104), (97, 104), (96, 103), (97, 101), (127, 64), (65, 130)], ids=str)
def test_sign_axes_and_odd_sizes(size):
    found = phase_correlation(*waves(size))
    assert errors(found).max() < 0.02
    assert found.converged.all()
    assert not (found.flat | found.outside).any()


@pytest.mark.parametrize("weighting", ["ramp", "sqrt", "phase", "none"])
@pytest.mark.parametrize("contrast", ["local", "none"])
@pytest.mark.parametrize("robust", [True, False])
def test_every_option_finds_a_clean_shift(weighting, contrast, robust):
    moving, reference, truth = decimated()
    found = phase_correlation(moving, reference, weighting=weighting, contrast=contrast, robust=robust)
    assert found.converged.all()
    # the classic, unweighted by the common ground, carries the bias of its window: 0.1 px
    assert errors(found, truth).max() < (0.04 if robust else 0.15)
    assert (found.inliers is None) is not robust


@pytest.mark.parametrize("max_frequency", [0.1, 0.2, 0.25, 0.37, 0.5])
def test_any_band(max_frequency):
    found = phase_correlation(*waves(), max_frequency=max_frequency)
    assert errors(found).max() < (0.05 if max_frequency < 0.2 else 0.03)


@pytest.mark.parametrize("taper", [0.0, 0.15, 0.5, 1.0])
def test_any_taper(taper):
    moving, reference, truth = decimated()
    assert errors(phase_correlation(moving, reference, taper=taper), truth).max() < 0.03


def test_both_ways():
    moving, reference = waves()
    there = phase_correlation(moving, reference).shift
    back = phase_correlation(reference.expand_as(moving), moving).shift
    torch.testing.assert_close(there, -back, atol=0.01, rtol=0)


def test_the_dft_grid_finds_what_newton_finds():
    moving, reference, _ = decimated()
    newton = phase_correlation(moving, reference)
    for factor in (1, 2, 10, 100):
        grid = phase_correlation(moving, reference, upsample_factor=factor)
        on_grid = grid.shift * factor
        torch.testing.assert_close(on_grid, on_grid.round(), atol=1e-3, rtol=0)
        assert (grid.shift - newton.shift).abs().max() <= 0.5 / factor + 0.02
        assert grid.converged.all()


def test_a_start_is_taken_where_it_is_better():
    moving, reference = waves()
    plain = phase_correlation(moving, reference)
    for away in (0.4, 2.0, 9.0):  # a poor start does no harm: the coarse peak is higher
        started = phase_correlation(moving, reference, start=TRUTH + away)
        torch.testing.assert_close(started.shift, plain.shift, atol=0.01, rtol=0)
        assert started.converged.all()
    # a start beyond the limit of the search is found there, and the search is not
    kept = phase_correlation(moving, reference, start=TRUTH + 0.1, max_translation=0.5)
    far = (TRUTH.abs() > 2).any(-1)
    assert far.any()
    assert (errors(kept)[far] < 0.02).all()
    assert kept.converged.all()
    assert not kept.outside.any()
    lost = phase_correlation(moving, reference, max_translation=0.5)
    assert (errors(lost)[far] > 0.5).all()
    assert lost.outside[far].all()


def test_masks_are_broadcast_and_heeded():
    moving, reference, truth = decimated((256, 256))
    mask = torch.ones(256, 256, dtype=torch.bool)
    mask[:, 80:120] = False
    spoilt = torch.where(mask, moving, 5.0)
    found = phase_correlation(spoilt, reference, mask)
    assert errors(found, truth).max() < 0.02
    same = phase_correlation(spoilt, reference, mask.expand(8, 256, 256))
    assert torch.equal(found.shift, same.shift)
    both = phase_correlation(spoilt, torch.where(mask, reference, -3.0), mask, mask)
    assert errors(both, truth).max() < 0.02  # and the common hole does not pull to 0
    assert (both.inliers >= 0).all()
    assert (both.inliers <= 1).all()


def test_leading_dimensions_and_one_reference_for_all():
    moving, reference = waves()
    plain = phase_correlation(moving, reference)
    deep = phase_correlation(moving.reshape(1, 5, 1, 96, 104), reference.expand(1, 1, 1, 96, 104))
    torch.testing.assert_close(deep.shift.reshape(5, 2), plain.shift, atol=1e-5, rtol=0)
    assert deep.sigma.shape == deep.flat.shape == (1, 5, 1)
    none = phase_correlation(moving[:0], reference)
    assert none.shift.shape == (0, 2)


@pytest.mark.parametrize("value", [0.0, 0.3, 1e4, 1e30, -7.0])
def test_a_flat_frame_is_flat(value):
    moving, reference = waves()
    for robust in (True, False):
        found = phase_correlation(torch.full_like(moving, value), reference, robust=robust)
        assert found.flat.all()
        assert all(
            field.isfinite().all()
            for field in (found.shift, found.significance, found.inliers)
            if field is not None
        )
        assert not found.sigma.isnan().any()
        assert phase_correlation(moving, torch.full_like(reference, value), robust=robust).flat.all()


def test_unrelated_scenes_are_not_believed():
    random = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 200, 64, 64, generator=random)
    smooth = torch.nn.functional.avg_pool2d(torch.stack([first, second]), 5, 1, 2)
    for moving, reference in ((first, second), smooth):
        found = phase_correlation(moving, reference)
        assert found.converged.float().mean() <= 0.02
        assert not found.shift.isnan().any()


@pytest.mark.parametrize("robust", [True, False])
@pytest.mark.parametrize("contrast", ["local", "none"])
@pytest.mark.parametrize("weighting", ["ramp", "sqrt"])
def test_gradients_are_those_of_the_criterion(robust, contrast, weighting):
    options = {"size": (28, 32), "dtype": torch.float64, "shortest": 5.0, "longest": 20.0}
    moving, reference = (image.clone().requires_grad_() for image in waves(**options))
    mask = torch.ones(28, 32, dtype=torch.bool)
    mask[:5, :8] = False
    for masks in ((), (mask, mask.flip(0))):

        def shift(moving, reference, masks=masks):
            return phase_correlation(
                moving, reference, *masks, robust=robust, contrast=contrast, weighting=weighting
            ).shift

        # random directions instead of every pixel: sharper than gradcheck, in a thousandth of the time
        assert_derivative(shift, (moving[:3], reference))
        slope = torch.autograd.grad(shift(moving, reference).sum(), moving)[0]
        # a gain and an offset do not move anything
        assert slope.sum((-2, -1)).abs().max() < 1e-6
        assert (slope * moving).sum((-2, -1)).abs().max() < 1e-6
        assert (slope.flatten(1).abs().amax(1) > 1e-6).all()


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_flat_frames_have_finite_gradients(value):
    moving, reference = (image.clone() for image in waves())
    moving[1] = value
    moving.requires_grad_()
    reference.requires_grad_()
    found = phase_correlation(moving, reference)
    found.shift.sum().backward()
    assert moving.grad.isfinite().all()
    assert reference.grad.isfinite().all()


def test_sigma_follows_the_noise():
    moving, reference, _ = decimated()
    levels = []
    for noise in (0.01, 0.03, 0.1):
        random = torch.Generator().manual_seed(7)
        noisy = (moving[:1] + noise * torch.randn(24, 128, 128, generator=random)).contiguous()
        found = phase_correlation(noisy, reference)
        spread = found.shift.std(0).mean()
        levels.append(float(found.sigma.mean()))
        assert 0.4 < found.sigma.mean() / spread < 2.5
    assert levels[0] < levels[1] < levels[2]


# --------------------------------------------------------------------------------------------------- the links


@pytest.mark.parametrize(
    ("size", "frequency", "expected"),
    [
        ((256, 101), 0.25, (128, 56)),
        ((256, 101), 0.5, (256, 101)),
        ((1, 1), 0.25, (1, 1)),
        ((5, 7), 0.01, (5, 7)),
        ((100, 100), 0.05, (16, 16)),
    ],
)
def test_working_size(size, frequency, expected):
    assert working_size(size, frequency) == expected


@pytest.mark.parametrize("size", [(64, 64), (63, 80), (61, 59)])
def test_the_low_pass_keeps_waves_in_the_band_and_drops_the_rest(size):
    height, width = size
    y, x = torch.arange(height, dtype=torch.float64)[:, None], torch.arange(width, dtype=torch.float64)
    coarse = working_size(size, 0.25)
    inner = (slice(coarse[0] // 4, -coarse[0] // 4), slice(coarse[1] // 4, -coarse[1] // 4))
    at_y = torch.arange(coarse[0], dtype=torch.float64)[:, None] * (height / coarse[0])
    at_x = torch.arange(coarse[1], dtype=torch.float64) * (width / coarse[1])

    def wave(y, x, cycles):
        return torch.cos(2 * math.pi * (cycles[0] * y / height + cycles[1] * x / width) + 0.4)

    def limited(image):
        return low_pass(image - image.mean(), [(coarse, 0.25)])[0]

    slow = (6, 5)  # cycles per frame, about 0.1 cycles per pixel
    found = limited(wave(y, x, slow))[inner]
    assert (found - wave(at_y, at_x, slow)[inner]).abs().max() < 0.06  # the fading border rings a little
    fast = (round(0.3 * height), round(0.2 * width))
    assert limited(wave(y, x, fast))[inner].abs().max() < 0.06
    assert limited(torch.full(size, 5.0)).abs().max() < 1e-5


def test_local_contrast_knows_no_gain_and_no_offset():
    image = waves()[0]
    contrast = local_contrast(image)
    assert contrast.shape == image.shape
    assert 0.3 < contrast.std() < 2
    assert contrast.abs().max() < 5
    torch.testing.assert_close(local_contrast(1000 * image + 50), contrast, atol=2e-3, rtol=0)
    assert local_contrast(torch.zeros(3, 20, 20)).abs().max() == 0
    usable = torch.ones(96, 104, dtype=torch.bool)
    usable[10:30] = False
    assert local_contrast(image, usable)[:, 10:30].abs().max() == 0
    assert local_contrast(image, torch.zeros_like(usable)).abs().max() == 0


def test_local_contrast_evens_out_clouds():
    image = waves()[0][0]
    cloudy = image.clone()
    cloudy[20:50, 20:60] = 9.0
    assert local_contrast(cloudy).abs().max() < 6
    away = (slice(70, 90), slice(10, 90))
    scale = local_contrast(cloudy)[away].std() / local_contrast(image)[away].std()
    assert 0.5 < scale < 2


def test_cross_power_is_its_definition():
    random = torch.Generator().manual_seed(2)
    first, second = torch.randn(2, 3, 16, 20, generator=random, dtype=torch.float64)
    one, two = torch.fft.rfft2(first), torch.fft.rfft2(second)
    fy, fx = torch.fft.fftfreq(16, dtype=torch.float64)[:, None], torch.fft.rfftfreq(20, dtype=torch.float64)
    radius = torch.hypot(fx, fy)
    plain = one.conj() * two
    magnitude = plain.abs()
    expected = {
        "ramp": plain * radius,
        "none": plain,
        "phase": plain / magnitude,
        "sqrt": plain / magnitude.sqrt(),
    }
    for weighting, value in expected.items():
        for limit in (0.5, 0.3):
            found = cross_power(one, two, radius, limit, weighting)
            torch.testing.assert_close(found, value * (radius < limit), atol=1e-9, rtol=1e-6)
        assert cross_power(0 * one, two, radius, 0.5, weighting).abs().max() == 0


@pytest.mark.parametrize("size", [(32, 40), (33, 41)], ids=str)
@pytest.mark.parametrize("scale", [1, 2])
def test_coarse_peak_finds_wraps_and_limits(size, scale):
    rows, columns = size
    frame = (rows * scale, columns * scale)
    for dy, dx in ((0, 0), (3, -4), (-5, 2), (0, -1)):
        surface = 0.01 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
        surface[dy, dx] += 5.0
        surface[dy, (dx + 1) % columns] += 2.0
        surface[dy, dx - 1] += 2.0
        peak = coarse_peak(surface, frame, 7.0 * scale)
        assert (peak.shift - scale * torch.tensor([dx, dy])).norm() < 0.05 * scale
        assert peak.significance > 10
        assert not peak.outside
        strict = coarse_peak(surface, frame, 0.1)
        assert strict.outside == ((dy, dx) != (0, 0))
        assert strict.shift.norm() <= 0.1 + 1.5 * scale
    nothing = coarse_peak(torch.zeros(2, rows, columns), frame, 5.0)
    assert nothing.shift.norm(dim=-1).max() <= 5.0 + 1.5 * scale
    assert not nothing.outside.any()
    assert torch.equal(nothing.significance, torch.zeros(2))


def test_agreement_is_high_on_common_ground_and_low_elsewhere():
    random = torch.Generator().manual_seed(3)
    ground = torch.randn(64, 64, generator=random)
    other = ground.clone()
    other[:, 32:] = torch.randn(64, 32, generator=random)
    weights = agreement(other, ground)
    assert weights[:, :24].min() > 0.9
    assert weights[:, 40:].mean() < 0.1
    assert agreement(ground, -ground).max() < 1e-3  # the negative is not the same ground
    assert agreement(0 * ground, ground).max() == 0
    assert agreement(0 * ground, 0 * ground).max() == 0


@pytest.mark.parametrize("size", [(24, 32), (25, 31), (25, 32)], ids=str)
def test_refine_peak_finds_the_top_of_the_polynomial(size):
    random = torch.Generator().manual_seed(5)
    rows, columns = size
    fy = torch.fft.fftfreq(rows, dtype=torch.float64)
    fx = torch.fft.rfftfreq(columns, dtype=torch.float64)
    radius = torch.hypot(fx, fy[:, None])
    spectrum = torch.fft.rfft2(torch.randn(4, rows, columns, generator=random, dtype=torch.float64)) * (
        radius < 0.4
    )
    truth = torch.tensor([[0.3, -0.2], [1.45, 2.6], [-3.0, 0.0], [0.5, -0.5]], dtype=torch.float64)
    angle = -2 * math.pi * (truth[:, 0, None, None] * fx + truth[:, 1, None, None] * fy[:, None])
    power = spectrum.conj() * spectrum * torch.polar(torch.ones_like(angle), angle)
    shift, step, curved = refine_peak(power, (fy, fx), truth.round())
    torch.testing.assert_close(shift, truth, atol=1e-8, rtol=0)
    assert curved.all()
    assert step.abs().max() < 1e-6
    # the value there is above that of any neighbour
    values = torch.fft.irfft2(power, s=size)
    assert (values.flatten(1).amax(1) <= power_value(power, fy, fx, shift) + 1e-9).all()
    # and what is climbed is that value, every bin of the whole spectrum counted once
    climbed = derivatives_at(power, (fy, fx), truth.round(), wave_orders((fy, fx)))[..., 0, 0]
    expected = power_value(power, fy, fx, truth.round()) * rows * columns
    if columns % 2:  # (of even sides the last column is its own conjugate, beyond every band)
        torch.testing.assert_close(climbed, expected, atol=0, rtol=1e-9)


def power_value(power, fy, fx, shift):
    """The correlation at a continuous shift, by the definition, in NumPy, with irfft2's scale."""
    twice = np.where((fx > 0) & (fx < 0.5), 2.0, 1.0)
    angle = 2 * np.pi * (shift[:, 0, None, None] * fx + shift[:, 1, None, None] * fy[:, None]).numpy()
    value = (power.numpy() * np.exp(1j * angle)).real * twice
    rows, columns = len(fy), 2 * (len(fx) - 1) + (1 if fx[-1] < 0.5 else 0)
    return torch.from_numpy(value.sum((1, 2)) / (rows * columns))


def test_refine_peak_of_nothing_stays():
    fy, fx = torch.fft.fftfreq(16), torch.fft.rfftfreq(16)
    start = torch.tensor([[0.3, 0.4]])
    shift, step, curved = refine_peak(torch.zeros(1, 16, 9, dtype=torch.complex64), (fy, fx), start)
    assert torch.equal(shift, start)
    assert torch.equal(step, torch.zeros(1, 2))
    assert not curved.any()


def test_documentation_of_bands():
    # what PCC's docstring claims of aliasing: the wide band is an order worse on decimated scenes
    moving, reference, truth = decimated((256, 256))
    narrow = errors(phase_correlation(moving, reference), truth).median()
    classic = {"max_frequency": 0.5, "weighting": "phase", "contrast": "none", "robust": False, "taper": 0.0}
    wide = errors(phase_correlation(moving, reference, **classic), truth).median()
    assert narrow < 0.005
    assert wide > 5 * narrow
