"""The orientation of edges: whatever the sign and the size of their contrast."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scenes import assert_derivative, centre_errors, corner_errors, fractal, fractal_stack, pairs
from scipy import ndimage

import torchalign as ta
from torchalign.datasets import simulate_stack, simulate_warped_stack
from torchalign.functional.ecc import enhanced_correlation
from torchalign.functional.phase import phase_correlation
from torchalign.functional.structure import orientation_field
from torchalign.functional.texture import extract_texture
from torchalign.models.extractors import SIFT


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("degrees", [0, 20, 45, 90, 135, 160])
def test_the_angle_is_doubled(degrees):
    angle = math.radians(degrees)
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij")
    ramp = x * math.cos(angle) + y * math.sin(angle)
    middle = orientation_field(ramp)[:, 20, 20]
    expected = torch.tensor([math.cos(2 * angle), math.sin(2 * angle)])
    torch.testing.assert_close(middle / middle.norm(), expected, atol=1e-5, rtol=0)
    # strength 1, of which mean and median are nearly 1 too (less at the border): b = 1/2, twice the clip
    assert float(middle.norm()) == pytest.approx(0.5 / math.sqrt(1 + 2**2), abs=2e-3)


@pytest.mark.parametrize(("gain", "offset"), [(-1, 0), (1e-3, 5), (-40, 1e3)])
def test_gain_offset_and_sign_do_not_matter(gain, offset):
    image = noise(2, 50, 61)
    torch.testing.assert_close(
        orientation_field(gain * image + offset), orientation_field(image), atol=1e-7, rtol=1e-6
    )


def test_scipy_finds_the_same():
    image = noise(60, 70)
    smooth = ndimage.convolve(image.numpy(), np.outer([1, 2, 1], [1, 2, 1]) / 16, mode="nearest")
    gx, gy = (ndimage.convolve1d(smooth, [0.5, 0, -0.5], axis=axis, mode="nearest") for axis in (1, 0))
    inner = (slice(2, -2), slice(2, -2))
    angle = np.arctan2(gy, gx)[inner]
    field = orientation_field(image)[:, 2:-2, 2:-2].numpy()
    length = np.hypot(*field)
    np.testing.assert_allclose(field[0], length * np.cos(2 * angle), atol=1e-9)
    np.testing.assert_allclose(field[1], length * np.sin(2 * angle), atol=1e-9)
    # the local mean is close to a Gaussian's of 10 pixels
    strength = np.hypot(gx, gy)
    local = ndimage.gaussian_filter(strength, 10, mode="nearest")
    relative = strength / (local + np.median(local))
    assert (
        np.abs(np.hypot(*orientation_field(image).numpy()) - relative / np.sqrt(1 + (4 * relative) ** 2))[
            inner
        ].max()
        < 0.03
    )


def test_a_mask_hides_what_is_under_it_and_its_edge():
    image = noise(1, 64, 64)
    mask = torch.ones(1, 64, 64, dtype=torch.bool)
    mask[:, 20:30, 20:30] = False
    spoilt = torch.where(mask, image, 1e6)
    field, other = orientation_field(image, mask), orientation_field(spoilt, mask)
    assert torch.equal(field, other)
    assert (field[..., 18:32, 18:32] == 0).all()
    assert (field[..., 16, 16:34].norm(dim=0) > 0).all()
    # away from the hole the field is nearly what it is without one
    assert (field - orientation_field(image))[..., 45:, 45:].abs().max() < 0.01


@pytest.mark.parametrize("value", [0.0, 0.3, -1e4, 1e-30])
def test_a_flat_image_has_no_structure(value):
    image = torch.full((1, 40, 40), value, requires_grad=True)
    field = orientation_field(image)
    assert (field == 0).all()
    field.sum().backward()
    assert (image.grad == 0).all()
    assert extract_texture(image.detach(), contrast="structure").flat.all()


def test_it_is_differentiable():
    image = noise(9, 10).requires_grad_()
    assert torch.autograd.gradcheck(lambda given: orientation_field(given), (image,), atol=1e-4)


def test_the_shift_of_a_negative():
    data = fractal_stack(6, size=(96, 104), noise=0.002)
    aligner = ta.PCC(contrast="structure", robust=True, channel=0)
    estimate = aligner.estimate(1 - data.cube, data.reference)
    assert estimate.valid.all()
    assert (estimate.warp[..., 2] - data.shift).norm(dim=-1).max() < 0.03
    assert (estimate.score > 0.8).all()
    # brightness finds nothing there
    assert not ta.PCC(channel=0).estimate(1 - data.cube, data.reference).valid.any()


def test_a_radar_like_image_is_found_and_an_unrelated_one_is_flagged():
    data = fractal_stack(8, size=(160, 160), bands=1, noise=0.0)

    def radar(image):
        level = (image - image.min()) / (image.max() - image.min())
        looks = -torch.rand(4, *image.shape, generator=random).clamp(min=1e-6).log()
        return ((1 - level) ** 2 + 0.05) * looks.mean(0)

    random = torch.Generator().manual_seed(0)
    aligner = ta.PCC(contrast="structure")
    estimate = aligner.estimate(radar(data.cube), data.reference)
    assert estimate.valid.float().mean() >= 0.75
    error = (estimate.warp[..., 2] - data.shift).norm(dim=-1)[estimate.valid]
    assert error.max() < 1
    other = simulate_stack(fractal((832, 832), bands=1, seed=7), frames=8, size=(160, 160)).cube
    assert not aligner.estimate(radar(data.cube), other).valid.any()


def test_a_terrain_lit_from_two_sides():
    size = 220
    frequency = torch.hypot(torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)).clamp(min=1 / 110)
    waves = torch.fft.rfft2(torch.randn(size, size, generator=torch.Generator().manual_seed(4)))
    terrain = torch.fft.irfft2(waves * frequency**-2.0, s=(size, size))
    slope_y, slope_x = torch.gradient(terrain / terrain.std() * 15)

    def lit_from(side):
        toward = side * slope_x * math.sin(math.pi / 3) + slope_y * math.cos(math.pi / 3)
        return ((0.57 - 0.82 * toward) / (1 + slope_x**2 + slope_y**2).sqrt()).clamp(min=0)[None]

    evening, morning = lit_from(-1)[:, 20:180, 23:183], lit_from(1)[:, 20:180, 20:180]
    estimate = ta.PCC(contrast="structure").estimate(evening[None], morning)
    assert estimate.valid.all()
    torch.testing.assert_close(estimate.warp[0, :, 2], torch.tensor([3.0, 0.0]), atol=0.3, rtol=0)
    assert not ta.PCC().estimate(evening[None], morning).valid.any()


def test_defaults_follow_the_contrast_and_can_be_overruled():
    assert (ta.PCC().weighting, ta.PCC().robust, ta.PCC().max_sigma) == ("ramp", True, 0.15)
    across = ta.PCC(contrast="structure")
    assert (across.weighting, across.robust, across.max_sigma) == ("none", False, 1.0)
    chosen = ta.PCC(contrast="structure", weighting="ramp", robust=True, max_sigma=0.2)
    assert (chosen.weighting, chosen.robust, chosen.max_sigma) == ("ramp", True, 0.2)
    assert (ta.ECC().robust, ta.ECC().max_iterations, ta.ECC().max_sigma) == ("agreement", 4, 0.1)
    across = ta.ECC(contrast="structure")
    assert (across.robust, across.max_iterations, across.max_sigma) == ("none", 12, 1.0)
    with pytest.raises(ValueError, match="contrast"):
        ta.ECC(contrast="orientation")


def test_the_function_and_the_module_agree():
    data = fractal_stack(3, size=(96, 104), noise=0.002)
    moving, reference = data.cube[:, 0], data.reference[:1]
    found = phase_correlation(moving, reference, contrast="structure")
    estimate = ta.PCC(contrast="structure", channel=0).estimate(data.cube, data.reference)
    torch.testing.assert_close(found.shift, estimate.warp[..., 2], atol=1e-6, rtol=0)
    assert found.inliers is None


# ------------------------------------------------------------------------------------------------ other motions


def radar(image, seed=0):
    """A contrast that falls, then rises, and four-look speckle."""
    random = torch.Generator().manual_seed(seed)
    level = (image - image.min()) / (image.max() - image.min())
    looks = -torch.rand(4, *image.shape, generator=random).clamp(min=1e-6).log()
    return ((1 - level) ** 1.5 + 1.2 * (level - 0.65).clamp(min=0) + 0.05) * looks.mean(0)


@pytest.mark.parametrize("motion", ["affine", "homography"])
def test_ecc_finds_the_warp_of_a_negative(motion):
    data = simulate_warped_stack(fractal((800, 800)), motion=motion, frames=2, size=(120, 120), noise=0.002)
    aligner = ta.ECC(contrast="structure", motion=motion, channel=0)
    estimate = aligner.estimate(1 - data.cube, data.reference)
    assert estimate.valid.all()
    assert corner_errors(estimate.warp, data.warp, (120, 120)).max() < 0.1
    assert centre_errors(estimate.warp, data.warp, (120, 120)).max() < 0.05
    assert (estimate.score > 0.8).all()
    # brightness finds nothing there
    assert not ta.ECC(motion=motion, channel=0).estimate(1 - data.cube, data.reference).valid.any()


def test_ecc_finds_affine_warps_of_a_radar_like_image_and_flags_unrelated_ones():
    scene = fractal((1200, 1200), bands=1)
    data = simulate_warped_stack(scene, frames=4, size=(176, 176), noise=0.0, gain=(1.0, 1.0), offset=0.0)
    aligner = ta.ECC(contrast="structure", motion="affine", max_translation=8)
    estimate = aligner.estimate(radar(data.cube), data.reference)
    assert estimate.valid.float().mean() >= 0.75
    before = corner_errors(torch.eye(3)[None, :2], data.warp, (176, 176))
    error = corner_errors(estimate.warp, data.warp, (176, 176))
    assert before.median() > 4
    assert error[estimate.valid].max() < 1
    centre = centre_errors(estimate.warp, data.warp, (176, 176))
    assert (centre <= 3 * estimate.sigma)[estimate.valid].all()
    # what is not in common is part of the error, however many edges there are
    assert (estimate.sigma >= 0.24 * (1 - estimate.score))[estimate.valid].all()
    other = simulate_stack(fractal((944, 944), bands=1, seed=7), frames=4, size=(176, 176)).cube
    assert not aligner.estimate(radar(data.cube), other).valid.any()


@pytest.mark.parametrize("motion", ["translation", "euclidean"])
def test_ecc_and_pcc_find_the_same_shift(motion):
    data = fractal_stack(3, size=(128, 136), noise=0.002)
    ecc = ta.ECC(contrast="structure", motion=motion, channel=0).estimate(1 - data.cube, data.reference)
    assert ecc.valid.all()
    assert centre_errors(ecc.warp, translation(data.shift), (128, 136)).max() < 0.03
    cascade = ta.Cascade(
        ta.PCC(contrast="structure", channel=0), ta.ECC(contrast="structure", motion=motion, channel=0)
    )
    both = cascade.estimate(1 - data.cube, data.reference)
    assert (both.stage == 1).all()
    torch.testing.assert_close(both.warp, ecc.warp, atol=5e-3, rtol=0)


def translation(shift):
    return torch.cat((torch.eye(2).expand(len(shift), 2, 2), shift[..., None]), -1)


def test_orientations_turn_with_the_frame():
    size = (128, 128)
    data = fractal_stack(1, size=size, bands=1, noise=0.002)
    turned = 1 - data.cube.rot90(1, (-2, -1))
    # rot90 sends the pixel (x, y) to (y, 127 − x)
    init = torch.tensor([[[0.0, 1.0, 0.0], [-1.0, 0.0, 127.0]]])
    back = torch.linalg.inv(torch.cat((init, torch.tensor([[[0.0, 0.0, 1.0]]])), 1))[:, :2]
    estimate = ta.ECC(contrast="structure", motion="euclidean").estimate(turned, data.reference, init=back)
    assert estimate.valid.all()
    assert estimate.score.min() > 0.8
    truth = back.clone()
    truth[..., 2] += data.shift
    assert centre_errors(estimate.warp, truth, size).max() < 0.05
    # NumPy's rotation of the image turns its orientations by twice a quarter
    field = orientation_field(data.reference)
    expected = -torch.from_numpy(np.rot90(field.numpy(), 1, (-2, -1)).copy())
    torch.testing.assert_close(
        orientation_field(data.reference.rot90(1, (-2, -1))), expected, atol=2e-3, rtol=0
    )


@pytest.mark.parametrize("degrees", [4, 90, 163, 200])
def test_lgm_finds_a_negative_that_is_turned(degrees):
    size = (144, 144)
    scene = fractal((1100, 1100), bands=1)
    angle = math.radians(degrees)
    linear = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    # scipy turns the scene on its own pixels, about the centre of the frames
    matrix = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    middle = np.full(2, 549.5)
    turned = ndimage.affine_transform(
        scene[0].numpy(), matrix, middle - matrix @ middle, order=3, mode="reflect"
    )
    frames = [
        torch.nn.functional.avg_pool2d(image[None, None, 190:910, 190:910], 5)[0]
        for image in (torch.from_numpy(turned), scene[0])
    ]
    centre = torch.full((2,), 71.5)
    truth = torch.cat((linear, (centre - linear @ centre)[:, None]), 1)[None]
    lgm = ta.LGM(contrast="structure", motion="euclidean", max_num_keypoints=300)
    estimate = lgm.estimate(1 - frames[0][None], frames[1])
    assert estimate.valid.all()
    assert corner_errors(estimate.warp, truth, size).max() < 0.2
    ecc = ta.ECC(contrast="structure", motion="euclidean")
    refined = ta.Cascade(lgm, ecc).estimate(1 - frames[0][None], frames[1])
    assert (refined.stage == 1).all()
    assert corner_errors(refined.warp, truth, size).max() < 0.05
    # descriptors of brightness find nothing there
    assert not ta.LGM(motion="euclidean").estimate(1 - frames[0][None], frames[1]).valid.any()


def test_descriptors_of_unsigned_directions():
    image = fractal_stack(1, size=(128, 128), bands=1, noise=0.0).reference
    upright, turning = (SIFT(64, upright=upright, unsigned=True) for upright in (True, False))
    for extractor in (upright, turning):
        features, negative = extractor(image), extractor(1 - image)
        assert features.descriptors.shape == (1, 64, 64)
        torch.testing.assert_close(features.descriptors.norm(dim=-1), features.valid.float())
        # the order of blobs of the same response is anyone's: each finds itself
        torch.testing.assert_close(
            (features.descriptors @ negative.descriptors.mT).amax(-1),
            features.valid.float(),
            atol=1e-3,
            rtol=0,
        )
    # and half a turn, which upright ones tell
    half = image.rot90(2, (-2, -1))
    found = (turning(image).descriptors @ turning(half).descriptors.mT).amax(-1)
    told = (upright(image).descriptors @ upright(half).descriptors.mT).amax(-1)
    assert (found > 0.98).float().mean() > 0.8
    assert (told > 0.98).float().mean() < 0.2


def test_lgm_says_what_it_cannot_do_across_sensors():
    assert not ta.LGM(contrast="structure").refine
    for options, name in (
        ({"refine": True}, "refine"),
        ({"feature_model": "xfeat"}, "feature_model"),
        ({"matcher_model": "lightglue"}, "matcher_model"),
    ):
        with pytest.raises(ValueError, match=name):
            ta.LGM(contrast="structure", **options)


@pytest.mark.parametrize(("motion", "tolerance"), [("translation", 1e-5), ("affine", 0.05)])
def test_the_warp_is_differentiable(motion, tolerance):
    # (of an affine warp the turn is held fixed: near, not equal)
    data = pairs([[0.6, -0.4]], (40, 44), dtype=torch.float64, longest=16.0, seed=3)
    moving, reference = (image + 0.02 * noise(*image.shape) for image in (data.cube[:, 0], data.reference))
    exact = {"levels": 1, "max_iterations": 60, "tolerance": 1e-13, "taper": 0.0, "motion": motion}

    def warp(moving, reference):
        return enhanced_correlation(moving, reference, contrast="structure", robust="none", **exact).warp

    assert_derivative(warp, (moving, reference), directions=2, tolerance=tolerance)


@pytest.mark.parametrize("robust", ["agreement", "residual"])
def test_weights_of_vectors(robust):
    data = simulate_warped_stack(fractal((800, 800)), frames=2, size=(128, 128), max_rotation=2, noise=0.002)
    cube = 1 - data.cube
    cube[..., 30:70, 40:80] = 3.0
    found = enhanced_correlation(cube[:, 0], data.reference[:1], contrast="structure", robust=robust)
    assert found.converged.all()
    assert found.inliers.shape[-2:] == (64, 64)
    assert found.inliers[..., 18:32, 23:37].mean() < 0.5 * found.inliers.mean()
    assert centre_errors(found.warp, data.warp, (128, 128)).max() < 0.1
