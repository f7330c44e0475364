"""ECC and Cascade: accuracy on a real scene, OpenCV as the oracle, stages, options."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scenes import centre_errors, corner_errors, fractal_stack, pairs, quantiles, shift_errors
from torch import nn
from torch.nn import functional as F

import torchalign as ta
from torchalign.datasets import open_demo_scene, simulate_stack, simulate_warped_stack
from torchalign.functional.affine import (
    change_origin,
    identity_warp,
    invert_warp,
    to_homogeneous,
    transform_points,
    translation_warp,
)
from torchalign.types import Pair

OK, NO_TEXTURE, NOT_CONVERGED, TOO_FAR = (
    int(ta.Status[name]) for name in ("OK", "NO_TEXTURE", "NOT_CONVERGED", "TOO_FAR")
)


# ----------------------------------------------------------------------------------------- the figures


@pytest.mark.parametrize(
    ("clouds", "median", "tail"),
    [
        pytest.param(0.0, 0.005, 0.012, id="clean"),
        pytest.param(0.2, 0.012, 0.03, id="20 % cloud"),
        pytest.param(0.5, 0.012, 0.03, id="50 % cloud"),
    ],
)
def test_translations_on_landsat(landsat, clouds, median, tail):
    frames = 32 if clouds == 0.5 else 20  # a tail wants the more frames, the wider it is
    data = simulate_stack(landsat, frames=frames, cloud_fraction=clouds, seed=0)
    estimate = ta.Cascade(ta.PCC(), ta.ECC()).estimate(data.cube, data.reference)
    assert estimate.valid.all()
    found = quantiles(shift_errors(estimate, data.shift))
    assert found[0] <= median
    assert found[1] <= tail


def test_bias_at_every_fraction_of_a_pixel(landsat):
    data = simulate_stack(landsat, frames=40, seed=2)
    error = ta.ECC().estimate(data.cube, data.reference).warp[..., 2] - data.shift
    fraction = (data.shift * 5).round().remainder(5)
    bias = [error[..., axis][fraction[..., axis] == k].mean() for axis in (0, 1) for k in range(5)]
    assert torch.stack(bias).abs().max() <= 0.01


@pytest.mark.parametrize(
    ("motion", "median"), [pytest.param("affine", 0.03, marks=pytest.mark.slow), ("homography", 0.06)]
)
def test_corners_on_landsat(landsat, motion, median):
    ground = landsat.mean(0, keepdim=True)
    cube, reference, truth = simulate_warped_stack(ground, motion=motion, frames=3)
    assert (
        corner_errors(identity_warp(3), truth, (256, 256)).median() > 5
    )  # pixels: there is something to find
    estimate = ta.ECC(motion=motion).estimate(cube, reference)
    assert estimate.valid.all()
    errors = corner_errors(estimate.warp, truth, (256, 256))
    assert errors.median() <= median
    assert errors.max() <= 3 * median


@pytest.mark.parametrize(
    ("blur", "worst"),
    [
        pytest.param(0.5, 0.03, marks=pytest.mark.slow),
        (1.5, 0.05),
        pytest.param(3.0, 0.06, marks=pytest.mark.slow),
    ],
)
def test_cascade_on_shifts_of_20_pixels(landsat, blur, worst):
    # sharp to very smooth scenes; at σ = 3 px little is left of the band: 1 frame in 50 errs by 0.05 … 0.06 px
    cascade = ta.Cascade(ta.PCC(max_translation=32), ta.ECC(max_translation=32))
    noise = 0.01 if blur < 2 else 0.002
    data = simulate_stack(landsat, frames=8, max_shift=20 / math.sqrt(2), blur=blur, noise=noise, seed=3)
    estimate = cascade.estimate(data.cube, data.reference)
    assert estimate.valid.all()
    errors = shift_errors(estimate, data.shift)
    assert errors.max() <= worst
    assert errors.quantile(0.9) <= 0.05


def test_hopeless_frames_are_flagged(landsat):
    data = simulate_stack(landsat, frames=4, seed=6)
    elsewhere = simulate_stack(landsat.flip(-1), frames=1, seed=7).reference
    for aligner in (ta.ECC(), ta.ECC(motion="affine"), ta.Cascade(ta.PCC(), ta.ECC())):
        aligned, estimate = aligner(data.cube, elsewhere)
        assert not estimate.valid.any()
        assert torch.equal(aligned, data.cube)


def sparse_scenes(count, seed, size=64, spots=7):
    """(count, 1, size, size): spots at random places on a flat ground with slight noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    centres = rng.uniform(0, size, (2, count, spots, 1, 1))
    bumps = np.exp(-((x - centres[0]) ** 2 + (y - centres[1]) ** 2) / (2 * 1.5**2))
    scenes = (rng.uniform(0.5, 1.5, (count, spots, 1, 1)) * bumps).sum(1)
    return torch.from_numpy(scenes + 0.01 * rng.standard_normal(scenes.shape)).float()[:, None]


@pytest.mark.parametrize("motion", ["translation", "affine"])
def test_a_few_spots_that_fit_by_chance_are_not_enough(motion):
    # seven spots are seven facts, however many samples they cover, and there are many places to compare
    aligner = ta.ECC(motion=motion, max_translation=31)
    still, *others = sparse_scenes(81, seed=7)
    assert not aligner.estimate(torch.stack(others), still).valid.any()
    # all of them fitting is: none of it turns down what is right
    large = sparse_scenes(1, seed=1, size=96, spots=30)
    estimate = aligner.estimate(large[..., 20:84, 12:76], large[0, :, 12:76, 20:84])
    torch.testing.assert_close(estimate.warp[0, :, 2], torch.tensor([-8.0, 8.0]), atol=0.1, rtol=0)
    assert estimate.valid.all()


def test_sigma_is_calibrated(landsat):
    ratios = []
    for seed, options in enumerate(
        (
            {},
            {"cloud_fraction": 0.2},
            {"cloud_fraction": 0.5},
            {"noise": 0.03},
            {"size": (128, 128)},
            {"blur": 1.0},
        )
    ):
        data = simulate_stack(landsat, frames=10, seed=30 + seed, **options)
        estimate = ta.Cascade(ta.PCC(), ta.ECC()).estimate(data.cube, data.reference)
        error = estimate.warp[..., 2] - data.shift
        ratios.append((error / estimate.sigma[:, None]).abs()[estimate.valid].flatten())
    ratio = torch.cat(ratios)
    assert 0.60 <= (ratio < 1).float().mean() <= 0.80
    assert (ratio < 2).float().mean() >= 0.90


# ------------------------------------------------------------------------------------------------ OpenCV as oracle


@pytest.mark.parametrize("motion", ["translation", "euclidean", "affine", "homography"])
def test_opencv_finds_the_same(motion):
    cv2 = pytest.importorskip("cv2")
    mode = getattr(cv2, f"MOTION_{motion.upper()}")
    truth = torch.tensor([[1.004, 0.006, 1.3], [-0.005, 0.998, -0.8]], dtype=torch.float64)
    if motion == "translation":
        truth[:, :2] = torch.eye(2)
    if motion == "euclidean":
        truth[:, :2] = torch.tensor([[math.cos(0.01), -math.sin(0.01)], [math.sin(0.01), math.cos(0.01)]])
    data = pairs(truth[None], (128, 128), longest=30.0, shortest=6.0)
    moving, reference = data.cube[0, 0].numpy(), data.reference[0].numpy()
    start = np.eye(3 if motion == "homography" else 2, 3, dtype=np.float32)
    stop = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 200, 1e-8)
    _, inverse = cv2.findTransformECC(reference, moving, start, mode, stop, None, 5)
    # OpenCV's is reference → moving: ours is its inverse
    expected = invert_warp(to_homogeneous(torch.from_numpy(inverse).double()))
    estimate = ta.ECC(motion=motion).estimate(data.cube, data.reference)
    assert corner_errors(estimate.warp[0], expected, (128, 128)) < 0.08
    assert corner_errors(estimate.warp[0], truth, (128, 128)) < 0.03


# ---------------------------------------------------------------------------------------------------- the options


def test_gauss_kernel_size_is_a_sigma():
    data = fractal_stack(3, size=(96, 96))
    by_size = ta.ECC(gauss_kernel_size=5).estimate(data.cube, data.reference)
    by_sigma = ta.ECC(sigma_blur=1.1).estimate(data.cube, data.reference)
    none = ta.ECC().estimate(data.cube, data.reference)
    assert torch.equal(by_size.warp, by_sigma.warp)
    assert not torch.equal(by_size.warp, none.warp)
    assert torch.equal(ta.ECC(gauss_kernel_size=1).estimate(data.cube, data.reference).warp, none.warp)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"motion": "rigid"}, ValueError),
        ({"levels": 0}, ValueError),
        ({"levels": 2.0}, TypeError),
        ({"max_iterations": 0}, ValueError),
        ({"max_iterations": True}, TypeError),
        ({"tolerance": 0}, ValueError),
        ({"gauss_kernel_size": 4}, ValueError),
        ({"gauss_kernel_size": 3, "sigma_blur": 1.0}, ValueError),
        ({"sigma_blur": -1}, ValueError),
        ({"max_frequency": 0.6}, ValueError),
        ({"robust": "huber"}, ValueError),
        ({"robust": True}, ValueError),
        ({"gradients": "exact"}, ValueError),
        ({"contrast": "global"}, ValueError),
        ({"taper": 1.5}, ValueError),
        ({"max_sigma": 0}, ValueError),
    ],
    ids=str,
)
def test_bad_options(options, kind):
    with pytest.raises(kind, match=r"expected .* got .*;"):
        ta.ECC(**options)


def test_the_reference_is_prepared_once(monkeypatch):
    data = fractal_stack(6, size=(64, 72))
    calls = []
    original = ta.ECC.prepare_reference
    monkeypatch.setattr(ta.ECC, "prepare_reference", lambda *given: calls.append(1) or original(*given))
    monkeypatch.setattr(ta.ECC, "_block_pixels", lambda _: 64 * 72 * 2)  # three blocks
    ta.ECC().estimate(data.cube, data.reference)
    assert len(calls) == 1


def test_blocks_are_the_same(monkeypatch):
    data = fractal_stack(7, size=(64, 72), cloud_fraction=0.1)
    for aligner in (ta.ECC(motion="affine"), ta.Cascade(ta.PCC(), ta.ECC())):
        whole = aligner(data.cube, data.reference)
        monkeypatch.setattr(type(aligner), "_block_pixels", lambda _: 64 * 72 * 2)
        blocks = aligner(data.cube, data.reference)
        torch.testing.assert_close(blocks.estimate.warp, whole.estimate.warp, atol=1e-4, rtol=0)
        torch.testing.assert_close(blocks.aligned, whole.aligned, atol=1e-3, rtol=0)


# ---------------------------------------------------------------------------------------------------- the cascade


def test_a_stage_that_fails_is_undone():
    data = fractal_stack(6, size=(96, 104), bands=4)
    good = ta.PCC().estimate(data.cube, data.reference)
    # an ECC that cannot converge: what it says is not taken
    cascade = ta.Cascade(ta.PCC(), ta.ECC(tolerance=1e-9, max_iterations=1))
    estimate = cascade.estimate(data.cube, data.reference)
    assert estimate.valid.all()
    assert torch.equal(estimate.warp, good.warp)
    assert torch.equal(estimate.sigma, good.sigma)


def test_a_stage_that_makes_a_frame_worse_is_undone():
    class Astray(ta.PCC):
        """Sure of itself, and wrong by a pixel on every other frame."""

        def estimate_motion(self, *arguments):
            motion = super().estimate_motion(*arguments)
            warp = motion.warp.clone()
            warp[..., 1::2, 0, 2] += 1.0
            return motion._replace(warp=warp)

    data = fractal_stack(6, size=(96, 104), bands=4)
    estimate = ta.Cascade(ta.PCC(), Astray()).estimate(data.cube, data.reference)
    assert estimate.valid.all()
    assert shift_errors(estimate, data.shift).max() < 0.05
    alone = Astray().estimate(data.cube, data.reference)
    assert shift_errors(alone, data.shift)[alone.valid].max() > 0.5  # alone it is taken at its word


class Told(ta.PCC):
    """Sure of the warps that it was told, whatever it sees."""

    def __init__(self, warp, **options):
        super().__init__(**options)
        self.warp, self.motion = warp, "affine"

    def estimate_motion(self, *arguments):
        motion = super().estimate_motion(*arguments)
        warp = change_origin(self.warp, self.origin)
        return motion._replace(warp=warp, status=0 * motion.status, only_shifts=False)

    def _prepare_block(self, job):
        block = super()._prepare_block(job)
        self.origin = block.origin
        return block


def test_a_stage_beyond_its_limit_hands_nothing_on():
    data = fractal_stack(4, size=(96, 104), bands=2)
    wild = identity_warp(4)
    wild[1::2, 0, 2] = 30.0
    # sure of itself, and beyond what it may do: ECC, which sees no further than a few pixels, starts anew
    for first in (Told(wild, max_translation=5.0), Shifted(wild[..., 2], max_translation=5.0)):
        estimate = ta.Cascade(first, ta.ECC(max_translation=40.0)).estimate(data.cube, data.reference)
        assert estimate.valid.all()
        assert shift_errors(estimate, data.shift).max() < 0.05
        # within its limit it is believed, and ECC lost
        first.max_translation = 40.0
        lost = ta.Cascade(first, ta.ECC(max_translation=40.0)).estimate(data.cube, data.reference)
        assert not lost.valid[1::2].any() or shift_errors(lost, data.shift)[1::2].min() > 1


class Shifted(ta.PCC):
    """The same for shifts, which it says are rough: two that are both sure and differ are no agreement."""

    def __init__(self, shift, **options):
        super().__init__(**options)
        self.shift = shift

    def estimate_motion(self, *arguments):
        motion = super().estimate_motion(*arguments)
        rough = torch.full_like(motion.sigma, 2.0)
        return motion._replace(
            warp=translation_warp(self.shift),
            sigma=rough,
            covariance=None,
            status=0 * motion.status,
            distorted=None,
        )


def test_a_stage_with_a_crop_starts_where_the_last_one_arrived(monkeypatch):
    angle = math.radians(30)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle), 0.7], [math.sin(angle), math.cos(angle), -0.6]])
    truth = change_origin(turn, (-63.5, -59.5))[None]
    data = pairs(truth, (120, 128), longest=24.0, seed=3)
    rough = truth.clone()
    rough[..., 2] += 0.4
    starts, estimate_motion = [], ta.ECC.estimate_motion

    def watched(self, pair, prepared, init):
        starts.append(init)
        return estimate_motion(self, pair, prepared, init)

    monkeypatch.setattr(ta.ECC, "estimate_motion", watched)
    cascade = ta.Cascade(Told(rough), ta.ECC(motion="affine", crop_center=72))
    estimate = cascade.estimate(data.cube, data.reference)
    assert estimate.stage.tolist() == [1]
    assert centre_errors(estimate.warp, truth, (120, 128)).max() < 0.05
    alone = ta.ECC(motion="affine", crop_center=72).estimate(data.cube, data.reference, init=rough)
    assert alone.valid.all()
    assert centre_errors(alone.warp, truth, (120, 128)).max() < 0.05
    # in pixels of the crop, whose corner is at (28, 24): about that the turn is another warp, 13 px from the truth
    corner = torch.tensor([28.0, 24.0])
    places = torch.tensor([[0.0, 0.0], [71.0, 0.0], [30.0, 60.0]])
    expected = (places + corner) @ rough[0, :, :2].mT + rough[0, :, 2] - corner
    assert len(starts) == 2
    for start in starts:
        found = places @ start[0, :2, :2].mT + start[0, :2, 2]
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_inliers_of_another_crop_judge_no_score():
    data = fractal_stack(4, size=(96, 104), cloud_fraction=0.3, seed=4)
    last = {"robust": "none", "max_sigma": 10.0}
    plain, weighted = (
        ta.Cascade(ta.PCC(crop_center=60, robust=robust, max_sigma=10.0), ta.ECC(**last))
        for robust in (False, True)
    )
    expected, found = (cascade.estimate(data.cube, data.reference) for cascade in (plain, weighted))
    torch.testing.assert_close(found.score_before, expected.score_before, atol=0.02, rtol=0)


def test_flat_frames_have_no_texture():
    data = fractal_stack(2, size=(64, 72), bands=1)
    flat = torch.full_like(data.cube, 0.5)
    assert (ta.ECC().estimate(flat, data.reference).status == NO_TEXTURE).all()
    assert (ta.ECC().estimate(data.cube, flat[0]).status == NO_TEXTURE).all()


def test_the_first_verdict_is_told_where_none_is_accepted():
    truth = torch.tensor([[12.5, -14.0], [1.0, -2.0]])
    data = pairs(truth, (128, 120), bands=2, longest=24.0, seed=5)
    estimate = ta.Cascade(ta.PCC(), ta.ECC()).estimate(data.cube, data.reference)
    assert estimate.status.tolist() == [TOO_FAR, OK]
    flat = torch.full_like(data.cube, 0.5)
    assert (ta.Cascade(ta.PCC(), ta.ECC()).estimate(flat, data.reference).status == NO_TEXTURE).all()


def test_stages_see_their_own_channel_and_crop():
    data = fractal_stack(4, size=(96, 104), bands=4)
    cube = data.cube.clone()
    cube[:, 0] = torch.rand(cube[:, 0].shape, generator=torch.Generator().manual_seed(3))  # noise
    cascade = ta.Cascade(ta.PCC(channel=1, crop_center=80), ta.ECC(channel=2, motion="affine"))
    estimate = cascade.estimate(cube, data.reference)
    assert estimate.valid.all()
    centre = transform_points(estimate.warp, torch.tensor([[51.5, 47.5]])) - torch.tensor([[51.5, 47.5]])
    assert (centre[:, 0] - data.shift).norm(dim=-1).max() < 0.05
    blind = ta.Cascade(ta.PCC(channel=0), ta.ECC(channel=0)).estimate(cube, data.reference)
    assert not blind.valid.any()


def test_shift_then_homography():
    data = fractal_stack(4, size=(96, 104))
    estimate = ta.Cascade(ta.PCC(), ta.ECC(motion="homography")).estimate(data.cube, data.reference)
    assert estimate.warp.shape == (4, 3, 3)
    assert estimate.valid.all()
    bad = data.cube.clone()
    bad[1] = float("nan")
    aligned, estimate = ta.Cascade(ta.PCC(), ta.ECC(motion="homography"))(bad, data.reference)
    assert torch.equal(estimate.warp[1], torch.eye(3))
    assert aligned[1].isnan().all()


@pytest.mark.parametrize("crop", [None, 80])
def test_homographies_have_1_for_their_last_entry(crop):
    data = fractal_stack(3, size=(96, 104))
    estimate = ta.ECC(motion="homography", crop_center=crop).estimate(data.cube, data.reference)
    assert estimate.valid.any()
    torch.testing.assert_close(estimate.warp[..., 2, 2], torch.ones(3), atol=1e-7, rtol=0)


def test_a_cascade_is_flat_and_says_what_it_is():
    inner = ta.Cascade(ta.PCC(max_translation=20), ta.ECC(max_translation=20))
    outer = ta.Cascade(inner, ta.ECC(motion="affine", interpolation="bicubic", min_score=0.1))
    assert [type(stage).__name__ for stage in outer.stages] == ["PCC", "ECC", "ECC"]
    assert (outer.interpolation, outer.min_score, outer.motion) == ("bicubic", 0.1, "affine")
    assert "max_translation=20.0" in repr(outer)
    assert "motion='affine'" in repr(outer)
    data = fractal_stack(3, size=(96, 104))
    assert ta.Cascade(ta.PCC()).estimate(data.cube, data.reference).valid.all()
    with pytest.raises(ValueError, match="at least one"):
        ta.Cascade()
    with pytest.raises(TypeError, match="one by one"):
        ta.Cascade([ta.PCC(), ta.ECC()])


def test_a_cascade_on_one_image_is_its_stages():
    # as a method among methods: on a channel that is there already
    data = fractal_stack(4, size=(96, 104), bands=1)
    cascade = ta.Cascade(ta.PCC(), ta.ECC())
    moving, reference = data.cube[:, 0], data.reference
    pair = Pair(moving, None, reference, None)
    motion = cascade.estimate_motion(pair, cascade.prepare_reference(reference, None), None)
    estimate = cascade.estimate(data.cube, data.reference)
    torch.testing.assert_close(motion.warp, estimate.warp, atol=1e-5, rtol=0)
    assert (motion.status == OK).all()
    # a stage that fails counts for nothing
    failing = ta.Cascade(ta.PCC(), ta.ECC(tolerance=1e-9, max_iterations=1))
    ready = failing.prepare_reference(reference, None)
    left = failing.estimate_motion(pair, ready, None)
    first = ta.PCC().estimate_motion(pair, ready[0], None)
    assert torch.equal(left.warp, first.warp)
    assert torch.equal(left.sigma, first.sigma)


def test_a_start_that_is_no_number_is_none_to_the_next_stage():
    data = fractal_stack(3, size=(96, 104))
    init = translation_warp(data.shift)
    init[1] = float("nan")
    estimate = ta.Cascade(ta.PCC(), ta.ECC()).estimate(data.cube, data.reference, init=init)
    assert estimate.valid.all()
    assert estimate.stage[1] == 1
    assert shift_errors(estimate, data.shift).max() < 0.05


def test_gradients_through_a_cascade():
    data = fractal_stack(2, size=(64, 72))
    cube, reference = data.cube.clone().requires_grad_(), data.reference.clone().requires_grad_()
    estimate = ta.Cascade(ta.PCC(), ta.ECC(motion="affine")).estimate(cube, reference)
    estimate.warp[..., 2].sum().backward()
    for gradient in (cube.grad, reference.grad):
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0


# ------------------------------------------------------------------------------------ the worked example: training


class Mixture(nn.Module):
    """A channel that learns how much each band counts."""

    def __init__(self, bands: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((bands,), 1 / bands))

    def forward(self, image):  # (..., C, H, W) → (..., H, W)
        return (self.weight[:, None, None] * image).sum(-3)


def after_the_harvest(scene, cell=20, seed=0):
    """(4, H, W): in half of the fields red and near infrared change sides; blue and green stay."""
    random = torch.Generator().manual_seed(seed)
    rows, columns = (-(-length // cell) for length in scene.shape[-2:])
    fields = torch.randn(1, 1, rows, columns, generator=random)
    fields = F.interpolate(fields, scale_factor=cell)[0, :, : scene.shape[-2], : scene.shape[-1]]
    mean, spread = scene.mean((-2, -1), keepdim=True), scene.std((-2, -1), keepdim=True)
    changed = mean + fields.sign() * (scene - mean) + 0.5 * spread * fields
    return torch.cat([scene[:2], changed[2:]])


def test_a_channel_is_trained_through_ecc():
    pytest.importorskip("spyndex")
    spring = torch.from_numpy(np.array(open_demo_scene().values))
    autumn = after_the_harvest(spring)
    options = {"size": (96, 96), "factor": 2, "noise": 0.003, "offset": 0.0, "gain": (0.9, 1.1)}
    reference = simulate_stack(spring, frames=0, **options).reference

    def squared_errors(aligner, seed, frames=8):
        made = simulate_stack(autumn, frames=frames, seed=seed, **options)
        estimate = aligner.estimate(made.cube, reference)
        return (estimate.warp[..., 2] - made.shift).square().sum(-1), estimate.valid

    def held_out(channel):
        with torch.no_grad():
            error, valid = squared_errors(ta.ECC(channel=channel), 100, frames=16)
        return error[valid].median().sqrt(), int(valid.sum())

    mixture = Mixture(4)
    start, accepted = held_out(mixture)
    aligner = ta.ECC(channel=mixture)
    optimizer = torch.optim.Adam(mixture.parameters(), lr=0.02)
    losses = []
    for step in range(20):
        error, valid = squared_errors(aligner, step)
        loss = error[valid].sum() / valid.sum().clamp(min=1)  # a frame that was left alone has no gradient
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.2 * np.mean(losses[:5])
    learnt, accepted_then = held_out(mixture)
    assert learnt < 0.3 * start
    assert accepted_then >= accepted
    # what stays from spring to autumn is what counts
    assert mixture.weight[:2].min() > mixture.weight[2:].abs().max()
