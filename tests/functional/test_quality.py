"""The score against NumPy, and the gate's verdicts one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scenes import Waves, pairs

from torchalign.functional.affine import identity_warp, translation_warp
from torchalign.functional.quality import _correlate, gate, gate_stages, normalized_cross_correlation
from torchalign.functional.uncertainty import isotropic, largest_sigma
from torchalign.functional.warp import resample
from torchalign.types import Motion, Status

NAN, INF = float("nan"), float("inf")


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ----------------------------------------------------------------------------------------------------- score


def test_score_is_the_correlation_coefficient():
    first, second = rand(3, 9, 11), rand(3, 9, 11, seed=1)
    second = first + second
    usable = rand(3, 9, 11, seed=2) > 0.3
    for t in range(3):
        chosen = usable[t]
        expected = np.corrcoef(first[t][chosen], second[t][chosen])[0, 1]
        assert abs(float(normalized_cross_correlation(first, second, usable)[t]) - expected) < 1e-12
        expected = np.corrcoef(first[t].flatten(), second[t].flatten())[0, 1]
        assert abs(float(normalized_cross_correlation(first, second)[t]) - expected) < 1e-12


@pytest.mark.parametrize("gain", [1e-4, 0.3, 1.0, 1e4, -1e-4, -1.0, -1e4])
@pytest.mark.parametrize("offset", [0.0, 1e-4, -1.0, 1e4])
def test_score_knows_no_gain_and_no_offset(gain, offset):
    first, second = rand(8, 6, 7), rand(8, 6, 7, seed=1)
    plain = normalized_cross_correlation(first, second)
    changed = normalized_cross_correlation(gain * first + offset, second)
    torch.testing.assert_close(changed, plain if gain > 0 else -plain, atol=1e-6, rtol=0)
    assert (plain.abs() <= 1).all()
    torch.testing.assert_close(plain, normalized_cross_correlation(second, first), atol=1e-12, rtol=0)


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e4, 1e15])
def test_score_of_an_image_with_itself_is_one(scale):
    image = rand(4, 20, 30, dtype=torch.float32) * scale
    for usable in (None, torch.ones(30, dtype=torch.bool)):
        score = normalized_cross_correlation(image, image, usable)
        torch.testing.assert_close(score, torch.ones(4), atol=1e-6, rtol=0)
        torch.testing.assert_close(
            normalized_cross_correlation(image, -image, usable), -torch.ones(4), atol=1e-6, rtol=0
        )


def test_score_of_raw_digital_numbers_keeps_its_digits():
    # 12 bits on a pedestal: the squares need more digits than float32 has
    image = 10_000 + (20 * rand(2, 64, 64, dtype=torch.float32)).round()
    other = image + (10 * rand(2, 64, 64, seed=3, dtype=torch.float32)).round()
    exact = normalized_cross_correlation(image.double(), other.double())
    torch.testing.assert_close(normalized_cross_correlation(image, other).double(), exact, atol=1e-5, rtol=0)


def test_score_where_there_is_nothing_to_score():
    image = rand(9, 11)
    flat, nothing = torch.full((9, 11), 0.7, dtype=torch.float64), torch.zeros(9, 11, dtype=torch.bool)
    assert normalized_cross_correlation(image, flat) == 0
    assert normalized_cross_correlation(flat, image) == 0
    assert normalized_cross_correlation(image, image, nothing) == 0
    one = nothing.clone()
    one[2, 3] = True
    assert normalized_cross_correlation(image, image, one) == 0
    assert normalized_cross_correlation(torch.full((9, 11), 0.1), torch.full((9, 11), 0.1)).abs() <= 1
    # what is not usable may be anything
    holed, usable = image.clone(), image > 0.2
    holed[~usable] = NAN
    holed[0, 0] = INF
    usable[0, 0] = False
    torch.testing.assert_close(
        normalized_cross_correlation(holed, image, usable), torch.ones((), dtype=torch.float64)
    )


def test_score_broadcasts_and_has_a_gradient():
    first, second = rand(2, 3, 8, 9), rand(8, 9, seed=1)
    assert normalized_cross_correlation(first, second).shape == (2, 3)
    assert normalized_cross_correlation(first[:0], second).shape == (0, 3)
    usable = rand(8, 9, seed=4) > 0.4
    images = (rand(2, 5, 6).requires_grad_(), rand(1, 5, 6, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(normalized_cross_correlation, images)
    assert torch.autograd.gradcheck(
        lambda one, two: normalized_cross_correlation(one, two, usable[:5, :6]), images
    )
    flat = torch.zeros(1, 5, 6, dtype=torch.float64, requires_grad=True)
    normalized_cross_correlation(flat, images[1]).sum().backward()
    assert flat.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------------ gate


@pytest.fixture(scope="module")
def scene():
    truth = torch.tensor([[1.5, -0.5], [0.0, 0.0], [-2.0, 1.0]])
    data = pairs(truth, (40, 48), scene=Waves(1, count=80, longest=24.0))
    return truth, data.cube[:, 0], data.reference


def judged(scene, shift, *, sigma=0.01, status=0, frame=0, **options):
    """The gate's estimate of one frame for a proposed shift."""
    _, moving, reference = scene
    warp = translation_warp(torch.tensor([shift], dtype=torch.float32))
    sigma, status = torch.tensor([sigma]), torch.tensor([int(status)])
    estimate = gate(warp, sigma, status, moving[frame : frame + 1], reference, **options)
    verdict = int(estimate.status)
    assert -1 <= estimate.score <= 1
    if verdict:
        assert torch.equal(estimate.warp, identity_warp(1))
        assert estimate.score == estimate.score_before
    else:
        assert estimate.score >= estimate.score_before
        assert estimate.sigma.isfinite()
    return Status(verdict), estimate


def test_gate_lets_the_truth_through(scene):
    verdict, estimate = judged(scene, (1.5, -0.5))
    assert verdict is Status.OK
    assert torch.equal(estimate.warp, translation_warp(torch.tensor([[1.5, -0.5]])))
    assert estimate.score > 0.99 > estimate.score_before
    assert estimate.sigma == torch.tensor(0.01)


def test_gate_stops_what_is_worse(scene):
    assert judged(scene, (-1.5, 0.5))[0] is Status.NOT_BETTER
    assert judged(scene, (3.5, 0.0), frame=1)[0] is Status.NOT_BETTER


def test_gate_keeps_the_limit(scene):
    assert judged(scene, (1.5, -0.5), max_translation=1.5)[0] is Status.TOO_FAR
    assert judged(scene, (1.5, -0.5), max_translation=1.6)[0] is Status.OK


def test_gate_measures_the_centre(scene):
    # half a turn about the centre does not move it, though its last column is (W−1, H−1)
    _, moving, reference = scene
    turn = torch.tensor([[[-1.0, 0.0, 47.0], [0.0, -1.0, 39.0]]])
    estimate = gate(
        turn, torch.zeros(1), torch.zeros(1, dtype=torch.long), moving[1:2].flip(-1, -2), reference
    )
    assert estimate.status == 0
    torch.testing.assert_close(estimate.score, torch.ones(1), atol=1e-4, rtol=0)


def test_gate_leaves_a_frame_in_place_in_place(scene):
    verdict, estimate = judged(scene, (0.02, 0.01), frame=1)
    assert verdict is Status.OK
    assert torch.equal(estimate.warp, identity_warp(1))
    assert estimate.score == estimate.score_before


def test_a_move_that_was_left_in_place_is_part_of_sigma(scene):
    shift, sigma = (0.2, -0.1), 0.01  # 0.22 px, which no score of this scene gains by
    verdict, estimate = judged(scene, shift, sigma=sigma, frame=1)
    assert verdict is Status.OK
    assert torch.equal(estimate.warp, identity_warp(1))
    # per axis: half of the squared length in each
    assert float(estimate.sigma) == pytest.approx((sigma**2 + 0.5 * 0.05) ** 0.5)
    torch.testing.assert_close(estimate.covariance, isotropic(estimate.sigma))


def test_a_frame_is_in_place_within_three_sigma(scene):
    assert judged(scene, (0.9, 0.0), sigma=0.2, frame=1)[0] is Status.NOT_BETTER
    verdict, estimate = judged(scene, (0.9, 0.0), sigma=0.4, frame=1)
    assert verdict is Status.OK
    assert torch.equal(estimate.warp, identity_warp(1))


def test_gate_takes_no_negative_score_for_a_gain(scene):
    _, moving, reference = scene
    # the less alike the better, if the frame is the reference's negative
    verdict, estimate = judged((None, -moving, reference), (0.7, 0.5), frame=1)
    assert verdict is Status.NOT_BETTER
    assert estimate.score_before < -0.99


def test_largest_sigma_is_numpys():
    half = rand(50, 2, 2) - 0.5
    covariance = half @ half.mT
    expected = np.sqrt(np.linalg.eigvalsh(covariance.numpy())[:, -1])
    np.testing.assert_allclose(largest_sigma(covariance).numpy(), expected, atol=1e-12)


def test_gate_keeps_the_methods_verdict(scene):
    for status in (Status.NOT_CONVERGED, Status.NO_TEXTURE, Status.TOO_FAR, Status.TOO_FEW_MATCHES):
        verdict, estimate = judged(scene, (1.5, -0.5), status=status)
        assert verdict is status
        assert not estimate.sigma.isnan()


def test_gate_min_score(scene):
    _, estimate = judged(scene, (1.3, -0.3))
    score = float(estimate.score)
    assert judged(scene, (1.3, -0.3), min_score=score - 1e-3)[0] is Status.OK
    assert judged(scene, (1.3, -0.3), min_score=score + 1e-3)[0] is Status.LOW_SCORE


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_gate_stops_what_is_no_number(scene, bad):
    assert judged(scene, (bad, 0.0))[0] in (Status.NOT_CONVERGED, Status.TOO_FAR)
    assert judged(scene, (1.5, -0.5), sigma=bad)[0] is Status.NOT_CONVERGED


def test_gate_scores_what_is_usable_only(scene):
    _, moving, reference = scene
    spoilt, usable = moving.clone(), torch.ones(40, 48, dtype=torch.bool)
    usable[:, 30:] = False
    spoilt[:, :, 30:] = 9.0
    assert judged((None, spoilt, reference), (1.5, -0.5))[1].score < 0.9
    verdict, estimate = judged((None, spoilt, reference), (1.5, -0.5), moving_usable=usable[None])
    assert verdict is Status.OK
    assert estimate.score > 0.98
    masked_reference = reference.clone()
    masked_reference[:, :, 30:] = 9.0
    verdict, estimate = judged((None, moving, masked_reference), (1.5, -0.5), reference_usable=usable[None])
    assert verdict is Status.OK
    assert estimate.score > 0.98


def test_gate_leaves_out_what_is_no_common_ground(scene):
    _, moving, reference = scene
    spoilt = moving.clone()
    spoilt[:, 20:] = 9.0
    inliers = torch.zeros(1, 10, 12)
    inliers[:, :4] = 1.0  # on a coarser grid
    _, estimate = judged((None, spoilt, reference), (1.5, -0.5), inliers=inliers)
    assert estimate.score > 0.98
    _, estimate = judged(scene, (1.5, -0.5), inliers=torch.zeros(1, 10, 12))  # no common ground at all
    assert estimate.score.isfinite()


def test_a_stage_that_is_not_trusted_judges_no_other(scene):
    _, moving, reference = scene
    moving = moving[:1]
    good = Motion(
        translation_warp(torch.tensor([[1.5, -0.5]], dtype=moving.dtype)),
        torch.full((1,), 0.01, dtype=moving.dtype),
        torch.zeros(1, dtype=torch.int64),
    )
    # it failed, and by its inliers there is no common ground
    failed = good._replace(
        status=torch.full((1,), int(Status.NOT_CONVERGED)), inliers=torch.zeros(1, 10, 12, dtype=moving.dtype)
    )
    alone = gate_stages([good], moving, reference, max_translations=[5.0])
    both = gate_stages([good, failed], moving, reference, max_translations=[5.0, 5.0])
    assert alone.valid.all()
    for field, expected in zip(both[:-1], alone[:-1], strict=True):
        assert torch.equal(field, expected)


@pytest.mark.parametrize("detour", [(2.3, -0.5), (-4.0, 3.0)], ids=["worse", "lost"])
def test_a_shift_that_was_not_kept_casts_no_doubt(scene, detour):
    _, moving, reference = scene
    moving = moving[:1]
    good, bad = (
        Motion(
            translation_warp(torch.tensor([shift], dtype=moving.dtype)),
            torch.full((1,), 0.01, dtype=moving.dtype),
            torch.zeros(1, dtype=torch.int64),
            only_shifts=True,
        )
        for shift in ((1.5, -0.5), detour)
    )
    alone = gate_stages([good], moving, reference, max_translations=[6.0])
    assert alone.valid.all()
    for stages in ([good, bad, good], [bad, good] if detour == (-4.0, 3.0) else [good, bad]):
        found = gate_stages(stages, moving, reference, max_translations=len(stages) * [6.0])
        assert found.valid.all()
        assert torch.equal(found.warp, alone.warp)
        assert torch.equal(found.sigma, alone.sigma)


def test_what_has_no_weight_may_be_of_any_size(scene):
    _, moving, reference = scene
    weight = torch.ones_like(moving)
    weight[:, :20] = 0
    rows = weight.flatten(-2)
    expected = _correlate(reference, moving, rows)
    filled = torch.where(weight == 0, 1e25, moving)
    torch.testing.assert_close(_correlate(reference, filled, rows), expected)


def test_a_shift_after_a_shift_keeps_what_parts_of_the_frame_disagreed_by(scene):
    # the second does not ask; the first found a trace of 2 · 0.05²
    truth, moving, reference = scene
    sigma, status = torch.full((3,), 0.01, dtype=moving.dtype), torch.zeros(3, dtype=torch.int64)
    second = Motion(translation_warp(truth), sigma, status, only_shifts=True)
    first = second._replace(misfit=torch.tensor([0.0, 0.005, 0.0], dtype=moving.dtype))
    found = gate_stages([first, second], moving, reference, max_translations=[6.0, 6.0])
    assert found.valid.all()
    wide = math.hypot(0.01, 0.05)
    torch.testing.assert_close(found.sigma, torch.tensor([0.01, wide, 0.01], dtype=moving.dtype))
    # one that asked, and found the same, has counted it
    asked = second._replace(misfit=first.misfit)
    found = gate_stages([first, asked], moving, reference, max_translations=[6.0, 6.0])
    torch.testing.assert_close(found.sigma, sigma)


def test_what_was_ambiguous_before_need_not_be_to_a_method_that_searched(scene):
    truth, moving, reference = scene
    sigma, status = torch.full((3,), 0.01, dtype=moving.dtype), torch.zeros(3, dtype=torch.int64)
    second = Motion(translation_warp(truth), sigma, status)
    first = second._replace(status=torch.full((3,), int(Status.AMBIGUOUS)))
    for searched in (False, True):
        stages = [first, second._replace(searched=searched)]
        found = gate_stages(stages, moving, reference, max_translations=[6.0, 6.0])
        assert (found.valid == searched).all()


def test_gate_handles_frames_one_by_one(scene):
    truth, moving, reference = scene
    warp = translation_warp(truth)
    sigma, status = torch.full((3,), 0.01), torch.zeros(3, dtype=torch.long)
    whole = gate(warp, sigma, status, moving, reference)
    for t in range(3):
        row = slice(t, t + 1)
        one = gate(warp[row], sigma[row], status[row], moving[row], reference)
        assert all(torch.equal(a, b[row]) for a, b in zip(one[:-1], whole[:-1], strict=True))
    spoilt = moving.clone()
    spoilt[1] = NAN
    other = gate(
        warp,
        sigma,
        torch.tensor([0, 3, 0]),
        torch.where(spoilt.isnan(), 0.0, spoilt),
        reference,
        moving_usable=~spoilt.isnan(),
    )
    for field, expected in zip(other[:-1], whole[:-1], strict=True):
        torch.testing.assert_close(field[::2], expected[::2], atol=1e-5, rtol=0)
    homographies = torch.cat([warp, torch.tensor([0.0, 0.0, 1.0]).expand(3, 1, 3)], -2)
    estimate = gate(homographies, sigma, torch.tensor([0, 1, 0]), moving, reference)
    assert torch.equal(estimate.warp[1], torch.eye(3))
    assert torch.equal(estimate.warp[0], homographies[0])


def test_large_frames_are_scored_on_a_lattice():
    data = pairs(torch.tensor([[-1.5, 0.5]]), (258, 400), scene=Waves(1, count=20))
    moving = data.cube[:, 0] + 0.05 * rand(1, 258, 400, dtype=data.cube.dtype)
    reference = data.reference
    warp = translation_warp(torch.tensor([[-1.5, 0.5]]))
    estimate = gate(warp, torch.full((1,), 0.01), torch.zeros(1, dtype=torch.int64), moving, reference)
    aligned = resample(moving[:, None], warp, interpolation="bicubic")
    inside = aligned.validity[0, ::2, ::2].numpy()
    # every second pixel: half of 258 is more than 128
    for found, image in ((estimate.score, aligned.values[0, 0]), (estimate.score_before, moving[0])):
        one, two = image[::2, ::2].numpy()[inside], reference[0, ::2, ::2].numpy()[inside]
        assert float(found) == pytest.approx(np.corrcoef(one, two)[0, 1], abs=1e-6)
