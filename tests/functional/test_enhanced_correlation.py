"""Enhanced correlation link by link, on scenes whose warp is analytic, and its derivatives."""

from __future__ import annotations

import functools
import math

import pytest
import scipy.ndimage
import torch
from scenes import Waves, assert_derivative, corner_errors, fractal_stack, pairs

from torchalign.functional import sampling
from torchalign.functional.affine import (
    center_displacement,
    identity_warp,
    to_homogeneous,
    transform_points,
    translation_warp,
)
from torchalign.functional.ecc import enhanced_correlation
from torchalign.functional.fourier import fft, irfft2, rfft, rfft2
from torchalign.functional.levels import far_level, level_frequencies, prepare_levels
from torchalign.functional.quality import normalized_cross_correlation

MOTIONS = ("translation", "euclidean", "similarity", "affine", "homography")
SIZE = (120, 136)


def about_centre(matrix, size=SIZE):
    """A warp given about the frame's centre → about the first pixel."""
    matrix = torch.as_tensor(matrix, dtype=torch.float64)
    centre = torch.eye(3, dtype=torch.float64)
    centre[:2, 2] = torch.tensor([(size[1] - 1) / 2, (size[0] - 1) / 2])
    warp = centre @ to_homogeneous(matrix) @ torch.linalg.inv(centre)
    return warp / warp[..., 2:, 2:]


def truth(motion, size=SIZE):
    cosine, sine = math.cos(0.04), math.sin(0.04)
    linear = {
        "translation": [[1, 0], [0, 1]],
        "euclidean": [[cosine, -sine], [sine, cosine]],
        "similarity": [[1.03 * cosine, -1.03 * sine], [1.03 * sine, 1.03 * cosine]],
        "affine": [[1.03, 0.03], [-0.02, 0.98]],
        "homography": [[1.02, 0.02], [-0.03, 0.98]],
    }[motion]
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[:2, :2] = torch.tensor(linear, dtype=torch.float64)
    matrix[:2, 2] = torch.tensor([1.7, -1.2])
    if motion == "homography":
        matrix[2, :2] = torch.tensor([2e-4, -1.5e-4])
    return about_centre(matrix, size)


def frames(warp, size=SIZE, **waves):
    """(1, H, W) moving, (1, H, W) reference, float64, of an analytic scene under any warp (3, 3)."""
    scene = Waves(1, **({"longest": 30.0, "shortest": 5.0} | waves))
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij")
    points = torch.stack((x, y), -1)
    moved = transform_points(warp, points.reshape(-1, 2)).reshape(points.shape)
    return scene.at(moved), scene.at(points)


corner_error = functools.partial(corner_errors, size=SIZE)


# ------------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("motion", MOTIONS)
def test_finds_every_motion_from_the_identity(motion):
    expected = truth(motion)
    moving, reference = frames(expected)
    found = enhanced_correlation(moving, reference, motion=motion)
    assert found.converged.all()
    assert found.warp.shape == (1, 3 if motion == "homography" else 2, 3)
    assert corner_error(found.warp, expected).max() < 0.03
    # what it was given is moving → reference: the other way round is the inverse
    back = enhanced_correlation(reference, moving, motion=motion)
    assert corner_error(torch.linalg.inv(to_homogeneous(back.warp)), expected).max() < 0.03


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_motion_stays_in_its_model(motion):
    # a similarity under a model that lacks its rotation or its scale
    moving, reference = frames(truth("similarity"))
    warp = enhanced_correlation(moving, reference, motion=motion).warp[0]
    linear = warp[:2, :2]
    if motion == "translation":
        assert torch.equal(linear, torch.eye(2, dtype=torch.float64))
    elif motion == "euclidean":
        torch.testing.assert_close(linear @ linear.T, torch.eye(2, dtype=torch.float64), atol=1e-9, rtol=0)
    elif motion == "similarity":
        square = linear @ linear.T
        torch.testing.assert_close(
            square, square[0, 0] * torch.eye(2, dtype=torch.float64), atol=1e-9, rtol=0
        )


@pytest.mark.parametrize("blur", [0.0, 1.1], ids=["no filter", "OpenCV's 5 × 5"])
def test_the_filter_does_not_bias_the_scale(blur):
    size = (256, 256)
    expected = about_centre([[1.02, 0.01, 1.0], [-0.01, 1.02, 0.5]], size)
    moving, reference = frames(expected, size, shortest=6.0, longest=40.0, seed=5)
    found = enhanced_correlation(
        moving, reference, motion="similarity", sigma_blur=blur, tolerance=1e-6, max_iterations=20
    )
    torch.testing.assert_close(found.warp[0, :2, :2], expected[:2, :2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("gain", [1e-4, 1e4])
def test_gain_and_offset_do_not_matter(gain):
    moving, reference = (image.float() for image in frames(truth("affine")))
    plain = enhanced_correlation(moving, reference, motion="affine")
    for other in (gain * moving + 3 * gain, moving + 5.0):
        found = enhanced_correlation(other, reference, motion="affine")
        assert found.converged.all()
        assert corner_error(found.warp, to_homogeneous(plain.warp[0].double())).max() < 2e-3


def test_levels_share_their_coordinates():
    # odd sizes, where half pixels would show; the coarse level alone, then all
    size = (131, 157)
    expected = about_centre([[1.0, 0.0, 2.3], [0.0, 1.0, -1.6]], size)
    moving, reference = frames(expected, size, shortest=12.0, longest=60.0)
    for frequency in (0.25, 0.125, 0.0625):
        found = enhanced_correlation(
            moving, reference, motion="translation", max_frequency=frequency, levels=1
        )
        # half a pixel of the level would be 0.5, 1, 2 pixels
        assert corner_error(found.warp, expected, size=size).max() < 0.05, frequency
    assert level_frequencies(size, levels=3) == (0.25, 0.125, 0.0625)
    assert len(level_frequencies((16, 16))) == 1


def test_masks_of_both_act():
    warp = about_centre([[1.0, 0.0, 1.4], [0.0, 1.0, -0.7]])
    moving, reference = frames(warp)
    generator = torch.Generator().manual_seed(1)
    block = torch.randn(40, 40, generator=generator, dtype=torch.float64) * 0.3 + 0.5
    spoilt, spoilt_reference = moving.clone(), reference.clone()
    spoilt[:, 30:70, 20:60] = block
    spoilt_reference[:, 33:73, 28:68] = block  # the same object elsewhere: it pulls as hard as it can
    mask, reference_mask = torch.ones(2, 1, *SIZE, dtype=torch.bool)
    mask[:, 28:72, 18:62] = False
    reference_mask[:, 31:75, 26:70] = False

    def error(robust, *masks):
        found = enhanced_correlation(spoilt, spoilt_reference, *masks, motion="translation", robust=robust)
        return corner_error(found.warp, warp).max()

    for robust in ("agreement", "residual", "none"):
        assert error(robust, mask, reference_mask) < 0.01, robust
    assert error("none") > 0.05  # the test would see it


@pytest.mark.parametrize("motion", ["translation", "affine"])
def test_a_frame_does_not_move_on_while_others_do(motion):
    # one that has arrived after a step, and one that takes many
    near, reference = frames(about_centre([[1.0, 0.0, 0.3], [0.0, 1.0, 0.1]]))
    far, _ = frames(about_centre([[1.0, 0.0, 2.2], [0.0, 1.0, -1.5]]))
    options = {"motion": motion, "max_iterations": 12, "levels": 1, "robust": "none"}
    alone = enhanced_correlation(near, reference, **options)
    both = enhanced_correlation(torch.cat((near, far)), reference, **options)
    assert both.converged.all()
    torch.testing.assert_close(both.warp[:1], alone.warp, atol=1e-7, rtol=0)


@pytest.mark.parametrize("motion", ["translation", "affine"])
@pytest.mark.parametrize("which", [2, 3], ids=["frame", "reference"])
def test_what_is_masked_is_no_evidence(motion, which):
    moving, reference = frames(about_centre([[1.0, 0.0, 1.4], [0.0, 1.0, -0.7]]))
    moving += 0.02 * torch.randn(moving.shape, generator=torch.Generator().manual_seed(0), dtype=moving.dtype)
    mask = torch.ones(1, *SIZE, dtype=torch.bool)
    mask[..., : SIZE[1] // 2] = False
    whole, half = (
        enhanced_correlation(*given, motion=motion, robust="none")
        for given in ((moving, reference), (moving, reference, *[None] * (which - 2), mask))
    )
    assert half.converged.all()
    # of half of the samples; what lies under the mask neither agrees nor pulls
    assert 0.6 < float(half.significance / whole.significance) < 0.8
    assert half.sigma < 6 * whole.sigma


def test_robust_weights_spare_what_changed():
    data = fractal_stack(8, size=(128, 128), cloud_fraction=0.3)
    moving, reference = data.cube.mean(1), data.reference.mean(0, keepdim=True)
    errors = {}
    for robust in ("agreement", "residual", "none"):
        found = enhanced_correlation(moving, reference, motion="translation", init=data.shift, robust=robust)
        errors[robust] = (found.warp[..., 2] - data.shift).norm(dim=-1).median()
        assert (found.inliers is None) == (robust == "none")
    assert errors["agreement"] < 0.6 * errors["none"]
    assert errors["agreement"] < errors["residual"] < errors["none"]
    found = enhanced_correlation(moving, reference, motion="translation", init=data.shift)
    # the inliers are where there are no clouds, seen on the reference's grid
    clear = torch.nn.functional.interpolate(
        data.clear[:, None].float(), size=found.inliers.shape[-2:], mode="area"
    )
    inliers = found.inliers[:, 8:-8, 8:-8]
    assert inliers[clear[:, 0, 8:-8, 8:-8] == 1].mean() > 3 * inliers[clear[:, 0, 8:-8, 8:-8] == 0].mean()


def test_a_coarse_level_that_leads_astray_is_undone():
    data = fractal_stack(12, size=(256, 256), cloud_fraction=0.5, seed=4)
    moving, reference = data.cube.mean(1), data.reference.mean(0, keepdim=True)
    found = enhanced_correlation(moving, reference, motion="translation", init=data.shift, levels=4)
    assert (found.warp[..., 2] - data.shift).norm(dim=-1).max() < 0.1


@pytest.mark.parametrize("motion", ["translation", "affine"])
def test_a_negative_correlation_is_no_reason_to_turn_back(motion):
    # 6.5 px are nearly half of all wavelengths: at the start the correlation is negative, the gain of the
    # theorem would be too, and the step would lead to where one frame is the other's negative
    expected = about_centre([[1.0, 0.0, 6.5], [0.0, 1.0, 0.0]])
    moving, reference = frames(expected, shortest=13.0, longest=17.0)
    assert normalized_cross_correlation(moving, reference) < -0.2
    found = enhanced_correlation(moving, reference, motion=motion, max_iterations=20, robust="none", levels=1)
    assert found.converged.all()
    assert corner_error(found.warp, expected).max() < 0.1


@pytest.mark.parametrize("motion", ["translation", "affine"])
def test_sigma_of_small_frames_is_their_error(motion):
    # of 40 px a side, 24 samples: blocks of 8 of these would be nine, hardly more than the parameters
    size = (40, 44)
    moving, reference = frames(about_centre([[1.0, 0.0, 0.6], [0.0, 1.0, -0.4]], size), size, longest=20.0)
    noise = torch.randn(2, 48, *size, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    given = (moving + 0.03 * noise[0], (reference + 0.03 * noise[1]))
    found = enhanced_correlation(*given, motion=motion, max_iterations=10)
    shift = center_displacement(found.warp, size)
    error = (shift - torch.tensor([0.6, -0.4])).square().sum(-1)
    ratio = (error / (2 * found.sigma.square()))[found.converged].mean().sqrt()
    assert found.converged.double().mean() > 0.9
    assert 0.5 < float(ratio) < 1.6


def test_init_as_shift_and_as_warp():
    truth_shift = torch.tensor([[20.3, -9.2], [0.4, 0.3]])
    data = pairs(truth_shift, SIZE, longest=24.0, seed=2)
    near = truth_shift + 0.4
    shifted = enhanced_correlation(data.cube[:, 0], data.reference, motion="translation", init=near)
    warped = enhanced_correlation(
        data.cube[:, 0], data.reference, motion="translation", init=translation_warp(near)
    )
    for found in (shifted, warped):
        assert found.converged.all()
        assert (center_displacement(found.warp, SIZE) - truth_shift).norm(dim=-1).max() < 0.02
    # a shift in the spectral domain and a spline say the same
    torch.testing.assert_close(shifted.warp, warped.warp, atol=5e-3, rtol=0)
    assert enhanced_correlation(
        data.cube[:, 0], data.reference, motion="translation", init=to_homogeneous(translation_warp(near))
    ).warp.shape == (2, 3, 3)


@pytest.mark.parametrize("motion", ["translation", "affine"])
def test_an_init_that_is_no_number(motion):
    data = fractal_stack(3, size=(64, 72), bands=1)
    moving, reference = data.cube[:, 0], data.reference
    good = enhanced_correlation(moving, reference, motion=motion, init=data.shift)
    for value in (float("nan"), float("inf")):
        shift = data.shift.clone()
        shift[1] = value
        found = enhanced_correlation(moving, reference, motion=motion, init=shift)
        assert found.converged.tolist() == [True, False, True]
        for field, expected in zip(found, good, strict=True):
            assert not field.isnan().any()
            assert torch.equal(field[::2], expected[::2])


@pytest.mark.parametrize("motion", ["affine", "homography"])
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e38])
def test_an_init_of_absurd_size_leads_nowhere(motion, size):
    data = fractal_stack(3, size=(64, 72), bands=1)
    moving, reference = data.cube[:, 0], data.reference
    init = translation_warp(data.shift)
    good = enhanced_correlation(moving, reference, motion=motion, init=init)
    init[1, :, :2] *= size  # its inverse, or its determinant, overflows
    found = enhanced_correlation(moving.requires_grad_(), reference, motion=motion, init=init)
    assert found.converged.tolist() == [True, False, True]
    for field, expected in zip(found, good, strict=True):
        assert not field.isnan().any()
        assert torch.equal(field[::2], expected[::2])
    found.warp[::2].sum().backward()
    assert moving.grad[::2].isfinite().all()


@pytest.mark.parametrize("motion", ["translation", "affine"])
def test_vmap_over_references_alone(motion):
    # the frames are plain tensors there, and yet nothing may be read
    data = fractal_stack(2, size=(64, 72), bands=1)
    references = torch.stack([data.reference, data.reference.roll(1, -1)])

    def found(reference):
        return enhanced_correlation(data.cube[:, 0], reference, motion=motion).warp

    expected = torch.stack([found(reference) for reference in references])
    torch.testing.assert_close(torch.func.vmap(found)(references), expected, atol=1e-3, rtol=0)


def test_products_keep_no_copies_of_the_regressors():
    reference = fractal_stack(1, size=(64, 72), bands=1).reference.requires_grad_()
    largest = []

    def keep(tensor):
        largest.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        (level,) = prepare_levels(reference, motion="homography", levels=1)
    assert level.products.shape[-2] == 55
    assert max(largest) < level.products.untyped_storage().nbytes()


def test_prepared_levels_are_the_same():
    moving, reference = frames(truth("affine"))
    levels = prepare_levels(reference, motion="affine")
    direct = enhanced_correlation(moving, reference, motion="affine")
    prepared = enhanced_correlation(moving, levels, motion="affine")
    assert torch.equal(direct.warp, prepared.warp)
    assert torch.equal(direct.sigma, prepared.sigma)


def test_leading_dimensions():
    data = fractal_stack(6, size=(64, 72), bands=1)
    moving, reference = data.cube[:, 0], data.reference
    plain = enhanced_correlation(moving, reference, motion="affine")
    deep = enhanced_correlation(moving.reshape(2, 3, 64, 72), reference.expand(2, 1, 64, 72), motion="affine")
    torch.testing.assert_close(deep.warp.reshape(6, 2, 3), plain.warp, atol=1e-3, rtol=0)
    assert deep.sigma.shape == deep.flat.shape == deep.converged.shape == (2, 3)
    assert enhanced_correlation(moving[:0], reference, motion="affine").warp.shape == (0, 2, 3)


def test_unrelated_scenes_do_not_converge():
    one = fractal_stack(24, size=(96, 96), bands=1, seed=1)
    other = fractal_stack(1, size=(96, 96), bands=1, seed=9).reference.flip(-1)
    for motion in ("translation", "affine"):
        found = enhanced_correlation(one.cube[:, 0], other, motion=motion)
        assert not found.converged.any(), motion
        assert found.significance.max() < 5


def test_one_direction_only_is_no_motion():
    x = torch.arange(128.0)
    stripes = (0.5 + 0.2 * torch.sin(0.5 * x) + 0.1 * torch.sin(0.21 * x)).expand(1, 128, 128)
    found = enhanced_correlation(stripes.roll(2, -1), stripes, motion="translation")
    assert found.warp.isfinite().all()
    assert not found.converged.any()


# --------------------------------------------------------------------------------------------------- derivatives


def noisy_pair(size=(40, 44)):
    data = pairs([[0.6, -0.4]], size, dtype=torch.float64, longest=16.0, seed=3)
    generator = torch.Generator().manual_seed(0)
    return tuple(
        image + 0.02 * torch.randn(image.shape, generator=generator, dtype=torch.float64)
        for image in (data.cube[:, 0], data.reference)
    )


EXACT = {"levels": 1, "max_iterations": 60, "tolerance": 1e-13, "robust": "none", "taper": 0.0}


@pytest.mark.parametrize("motion", MOTIONS)
def test_implicit_derivatives(motion):
    # with weights that do not move the theorem is exact
    assert_derivative(
        lambda moving, reference: enhanced_correlation(moving, reference, motion=motion, **EXACT).warp,
        noisy_pair(),
        directions=3,
    )


@pytest.mark.parametrize("motion", ["translation", "affine"])
def test_implicit_derivatives_with_weights_held(motion):
    # the weights are held fixed, so the derivative is that of re-weighted least squares: near, not equal
    options = {"levels": 1, "max_iterations": 60, "tolerance": 1e-13}
    assert_derivative(
        lambda moving, reference: enhanced_correlation(moving, reference, motion=motion, **options).warp,
        noisy_pair(),
        tolerance=0.05,
    )


def test_implicit_and_unrolled_derivatives_agree():
    moving, reference = noisy_pair()
    slopes = []
    for gradients in ("implicit", "unrolled"):
        leaf = moving.clone().requires_grad_()
        options = EXACT | {"max_iterations": 12}
        warp = enhanced_correlation(leaf, reference, motion="affine", gradients=gradients, **options).warp
        warp[..., 2].sum().backward()
        slopes.append(leaf.grad)
    torch.testing.assert_close(*slopes, atol=1e-4 * float(slopes[0].abs().max()), rtol=1e-3)


def test_the_optimum_does_not_depend_on_the_init():
    moving, reference = noisy_pair()
    init = identity_warp(1, dtype=torch.float64).requires_grad_()
    enhanced_correlation(moving, reference, motion="affine", init=init).warp.sum().backward()
    assert torch.equal(init.grad, torch.zeros_like(init))
    short = identity_warp(1, dtype=torch.float64).requires_grad_()
    enhanced_correlation(
        moving, reference, motion="affine", init=short, gradients="unrolled", max_iterations=1, levels=1
    ).warp.sum().backward()
    assert short.grad.abs().max() > 0  # one step does


def test_values_do_not_depend_on_whether_gradients_are_wanted():
    moving, reference = noisy_pair()
    plain = enhanced_correlation(moving, reference, motion="affine")
    with_gradient = enhanced_correlation(moving.requires_grad_(), reference, motion="affine")
    torch.testing.assert_close(with_gradient.warp.detach(), plain.warp, atol=1e-3, rtol=0)


# --------------------------------------------------------------------------------------------------------- parts


def test_the_spline_interpolates(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    field = torch.randn(1, 24, 32, generator=generator, dtype=torch.float64)
    spectrum = rfft2(field)
    y, x = torch.fft.fftfreq(24, dtype=torch.float64), torch.fft.rfftfreq(32, dtype=torch.float64)
    response = sampling.spline_response(y)[:, None] * sampling.spline_response(x)
    coefficients = sampling.continue_border(irfft2(spectrum / response, (24, 32)))
    at = torch.arange(4, 20, dtype=torch.float64)
    values = sampling.spline_at(coefficients, at[None], at[None])
    torch.testing.assert_close(values[0], field[0, at.long(), at.long()], atol=1e-10, rtol=0)
    # tap by tap and two by two (as on a GPU) are the same, and the slopes are those of the values
    column, row = (at + 0.27).requires_grad_(), (at - 0.11).requires_grad_()
    by_tap, by_column, by_row = sampling.spline_with_slopes(coefficients, column[None], row[None])

    def sampled(sample, *given, on_a_device):
        monkeypatch.setattr(sampling, "launches_kernels", lambda tensor: on_a_device)
        return sample(*given)

    for on_a_device in (False, True):
        values = sampled(sampling.spline_at, coefficients, column[None], row[None], on_a_device=on_a_device)
        torch.testing.assert_close(values, by_tap, atol=1e-10, rtol=0)
    # so are the bilinear samples, which scipy knows too, and beyond the border is the border
    padded, far = sampling.continue_border(field), torch.linspace(-9, 45, 16, dtype=torch.float64)
    plain, looked_up = (
        sampled(sampling.bilinear_at, padded, far[None], far.flip(0)[None], on_a_device=on_a_device)
        for on_a_device in (False, True)
    )
    torch.testing.assert_close(plain, looked_up, atol=1e-10, rtol=0)
    oracle = scipy.ndimage.map_coordinates(field[0].numpy(), [far.flip(0), far], order=1, mode="nearest")
    torch.testing.assert_close(plain[0], torch.from_numpy(oracle), atol=1e-10, rtol=0)
    expected = torch.autograd.grad(by_tap.sum(), (column, row))
    torch.testing.assert_close(by_column[0], expected[0], atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(by_row[0], expected[1], atol=1e-10, rtol=1e-8)


def test_transforms_of_nothing():
    none = torch.zeros(0, 12, 16)
    assert rfft2(none).shape == (0, 12, 9)
    assert irfft2(rfft2(none), (12, 16)).shape == (0, 12, 16)
    assert fft(rfft(none), dim=-2).shape == (0, 12, 9)
    image = torch.rand(2, 12, 16)
    torch.testing.assert_close(irfft2(rfft2(image), (12, 16)), image)


def test_levels_of_frames_of_another_size_raise():
    levels = prepare_levels(torch.rand(1, 96, 96))
    with pytest.raises(
        ValueError, match=r"reference: expected levels of frames of \(120, 136\), got \(96, 96\);"
    ):
        enhanced_correlation(torch.rand(2, *SIZE), levels)


def test_levels_for_another_motion_raise():
    levels = prepare_levels(torch.rand(1, *SIZE), motion="translation")
    with pytest.raises(ValueError, match=r"reference: expected levels for affine, got translation;"):
        enhanced_correlation(torch.rand(2, *SIZE), levels)


# --------------------------------------------------------------------------------------------------------- far away


def far_apart(motion, size=(128, 136), away=(31.0, -27.0), turn=6.0):
    """Frames whose centre is `away` off, and turned if the motion is no shift: (1, H, W) twice, and the warp."""
    angle = 0.0 if motion == "translation" else math.radians(turn)
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[:2, :2] = torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64
    )
    matrix[:2, 2] = torch.tensor(away, dtype=torch.float64)
    expected = about_centre(matrix, size)
    return *frames(expected, size, count=80), expected


@pytest.mark.parametrize("motion", ["translation", "euclidean", "affine"])
def test_all_translations_are_compared_first(motion):
    moving, reference, expected = far_apart(motion)
    found = enhanced_correlation(moving, reference, motion=motion, max_translation=50.0)
    assert found.converged.all()
    assert corner_error(found.warp, expected, size=(128, 136)).max() < 0.05
    # a climb alone does not come so far
    near = enhanced_correlation(moving, reference, motion=motion)
    assert corner_error(near.warp, expected, size=(128, 136)).min() > 5


def test_a_better_place_beyond_the_limit_is_found_too():
    moving, reference, expected = far_apart("translation")
    found = enhanced_correlation(moving, reference, motion="translation", max_translation=20.0)
    assert corner_error(found.warp, expected, size=(128, 136)).max() < 0.05


def test_where_the_search_is_of_use():
    levels = prepare_levels(torch.rand(1, 256, 256), motion="affine")
    assert far_level(levels, 16.0) is None
    assert levels[far_level(levels, 17.0)].grid.size == (32, 32)
    shifts = prepare_levels(torch.rand(1, 256, 256), motion="translation")
    assert far_level(shifts, 60.0) is not None
    assert far_level(shifts, 60.0, torch.zeros(1, 2)) is None


def test_flat_ground_beside_an_edge_does_not_change_the_scale():
    # towers on a sky of faint noise: the scale was 5e-3 off
    scene = 0.004 * torch.randn(1, 240, 240, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    scene = scipy.ndimage.gaussian_filter(scene.numpy()[0], 1.5)
    y, x = (torch.arange(240, dtype=torch.float64).numpy() for _ in range(2))
    for at, width in ((70, 2.5), (120, 7.0), (168, 3.0)):
        scene += (abs(x - at) < width) * (1 + 0.3 * (abs(y[:, None] - at) < 50))
    scene = scipy.ndimage.gaussian_filter(scene, 1.0)
    still = torch.from_numpy(scene)[None, 20:220, 20:220]
    zoom, centre = 1.05, 119.5
    away = centre * (1 - 1 / zoom)
    moved = torch.from_numpy(scipy.ndimage.affine_transform(scene, [1 / zoom] * 2, away, order=3))
    found = enhanced_correlation(moved[None, 20:220, 20:220], still, motion="similarity", max_iterations=12)
    assert found.warp[0, 0, 0].item() == pytest.approx(1 / zoom, abs=6e-4)
