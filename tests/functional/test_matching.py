"""Matches, robust fits and windows against loops, OpenCV, SciPy and analytic truth."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from scenes import assert_derivative, corner_errors, pairs

from torchalign.functional.affine import (
    change_origin,
    compose_warps,
    identity_warp,
    to_homogeneous,
    transform_points,
    translation_warp,
)
from torchalign.functional.matching import (
    Correspondences,
    consensus,
    mutual_matches,
    reweighted_fit,
    significance,
    window_ascent,
)
from torchalign.functional.motion import PARAMETERS
from torchalign.functional.texture import extract_texture
from torchalign.functional.uncertainty import largest_sigma

SIZE = (200, 240)
MOTIONS = list(PARAMETERS)
CENTRE = torch.tensor([(SIZE[1] - 1) / 2, (SIZE[0] - 1) / 2], dtype=torch.float64)


def motion_warp(motion: str, seed: int = 0, *, large: float = 1.0) -> torch.Tensor:
    """A motion of that kind, up to 20°, 15 % of zoom, 20 % of shear, some perspective; about the centre."""
    random = np.random.default_rng(seed)
    angle, zoom = large * random.uniform(0.1, 0.35), 1 + large * random.uniform(0.05, 0.15)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = {
        "translation": np.eye(2),
        "euclidean": turn,
        "similarity": zoom * turn,
        "affine": turn @ np.array([[zoom, large * 0.2], [0.0, 1.0]]),
        "homography": turn @ np.array([[zoom, large * 0.1], [0.0, 1.0]]),
    }[motion]
    warp = np.eye(3)
    warp[:2, :2], warp[:2, 2] = linear, large * random.uniform(-12, 12, 2)
    if motion == "homography":
        warp[2, :2] = large * random.uniform(-8e-4, 8e-4, 2)
        return change_origin(torch.from_numpy(warp), -CENTRE)
    return change_origin(torch.from_numpy(warp[:2]), -CENTRE)


def matched(warp, count=150, *, wrong=0.5, noise=0.2, seed=0, dtype=torch.float64):
    """Points all over the frame, their targets with noise, of which a share is anywhere."""
    random = np.random.default_rng(seed)
    points = torch.from_numpy(random.uniform(0, 1, (count, 2)) * np.array([SIZE[1], SIZE[0]]))
    targets = transform_points(warp, points) + noise * torch.from_numpy(random.standard_normal((count, 2)))
    bad = torch.from_numpy(random.uniform(size=count) < wrong)
    anywhere = torch.from_numpy(random.uniform(0, 1, (count, 2)) * np.array([SIZE[1], SIZE[0]]))
    return points.to(dtype), torch.where(bad[:, None], anywhere, targets).to(dtype), ~bad


corner_error = functools.partial(corner_errors, size=SIZE)


def fit(points, targets, weight, motion, **options):
    matched = Correspondences(points, targets, weight, SIZE)
    return reweighted_fit(consensus(matched, motion=motion), matched, motion=motion, **options)


# ---------------------------------------------------------------------------------------------------- matches


def brute_force(similarity, valid, other_valid, expected=None, others=None, radius=None):
    rows, columns = similarity.shape
    allowed = np.outer(valid, other_valid)
    if expected is not None:
        allowed &= np.hypot(*(expected[:, None] - others[None]).transpose(2, 0, 1)) <= radius
    index = np.full(rows, -1)
    for i in range(rows):
        best = [j for j in range(columns) if allowed[i, j]]
        if best:
            j = max(best, key=lambda j: similarity[i, j])
            if all(similarity[k, j] <= similarity[i, j] for k in range(rows) if allowed[k, j]):
                index[i] = j
    return index


@pytest.mark.parametrize("radius", [None, 0.2, 1e-6])
def test_mutual_matches_are_those_of_a_loop(radius):
    random = np.random.default_rng(0)
    batch = 4
    similarity = random.uniform(-1, 1, (batch, 30, 40))
    valid, other_valid = random.uniform(size=(batch, 30)) < 0.8, random.uniform(size=(batch, 40)) < 0.8
    valid[3] = False
    points, others = random.uniform(size=(batch, 30, 2)), random.uniform(size=(batch, 40, 2))
    guided = {} if radius is None else {"expected": points, "others": others, "radius": radius}
    found = mutual_matches(
        *(torch.from_numpy(array) for array in (similarity, valid, other_valid)),
        **{name: torch.from_numpy(value) if name != "radius" else value for name, value in guided.items()},
    )
    for b in range(batch):
        rest = {name: value if name == "radius" else value[b] for name, value in guided.items()}
        assert (
            found.index[b].tolist() == brute_force(similarity[b], valid[b], other_valid[b], **rest).tolist()
        )
    assert torch.equal(found.weight, (found.index >= 0).double())
    if radius == 1e-6:
        assert (found.index == -1).all()
    else:
        assert (found.index[:3] >= 0).sum() > 20
        for row in found.index:  # one to one
            kept = row[row >= 0]
            assert len(set(kept.tolist())) == len(kept)


def test_of_several_that_are_alike_the_first_is_matched():
    similarity = torch.tensor([[0.1, 0.2, 0.9], [0.1, 0.2, 0.9], [0.8, 0.8, 0.0]])
    every = torch.ones(3, dtype=torch.bool)
    assert mutual_matches(similarity, every, every).index.tolist() == [2, -1, 0]


# ------------------------------------------------------------------------------------------------------- fits


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("wrong", [0.0, 0.5, 0.7])
def test_fits_find_the_motion_among_wrong_matches(motion, wrong):
    truth = motion_warp(motion)
    points, targets, right = matched(truth, wrong=wrong)
    found = fit(points, targets, torch.ones(len(points), dtype=torch.float64), motion)
    assert found.warp.shape == ((3, 3) if motion == "homography" else (2, 3))
    # the standard error of a corner, of 0.2 px noise over the right matches, is well below
    assert corner_error(found.warp, truth) < 0.35 * (3 if motion == "homography" else 1)
    assert found.matches == len(points)
    assert abs(float(found.inliers) - int(right.sum())) <= 0.06 * len(points)
    assert (found.weight[right] > 0.05).double().mean() > 0.95
    assert found.weight[~right].mean() < 0.1 if wrong else True


@pytest.mark.parametrize("motion", MOTIONS)
def test_exact_matches_are_fitted_exactly(motion):
    truth = motion_warp(motion, 1)
    points, targets, _ = matched(truth, wrong=0.3, noise=0.0, seed=1)
    found = fit(points, targets, torch.ones(len(points), dtype=torch.float64), motion)
    assert corner_error(found.warp, truth) < 1e-6
    single = fit(points.float(), targets.float(), torch.ones(len(points)), motion)
    assert single.warp.dtype == torch.float32
    assert corner_error(single.warp, truth) < 2e-3
    still = fit(points, points.clone(), torch.ones(len(points), dtype=torch.float64), motion)
    assert torch.equal(still.warp, identity_warp(homography=motion == "homography", dtype=torch.float64))


@pytest.mark.parametrize("motion", ["affine", "homography"])
def test_a_mirrored_picture_is_none_of_its_motions(motion):
    # most matches agree on a reflection, which a linear map can express and no frame can do
    truth = motion_warp(motion, 2)
    points, targets, right = matched(truth, 200, wrong=0.6, noise=0.05, seed=2)
    mirrored = 2 * CENTRE * torch.tensor([1.0, 0.0]) + points * torch.tensor([-1.0, 1.0])
    targets = torch.where(right[:, None], targets, mirrored)
    assert right.double().mean() < 0.45
    found = fit(points, targets, torch.ones(200, dtype=torch.float64), motion)
    assert corner_error(found.warp, truth) < 0.5


@pytest.mark.parametrize("motion", ["similarity", "affine", "homography"])
def test_fits_are_as_good_as_opencv(motion):
    cv2 = pytest.importorskip("cv2")
    estimate = {
        "similarity": lambda p, q: cv2.estimateAffinePartial2D(
            p, q, method=cv2.RANSAC, ransacReprojThreshold=1.0
        )[0],
        "affine": lambda p, q: cv2.estimateAffine2D(p, q, ransacReprojThreshold=1.0)[0],
        "homography": lambda p, q: cv2.findHomography(p, q, cv2.RANSAC, 1.0)[0],
    }[motion]
    ours, theirs = [], []
    for seed in range(12):
        truth = motion_warp(motion, seed)
        points, targets, _ = matched(truth, wrong=0.5, seed=seed)
        found = fit(points, targets, torch.ones(len(points), dtype=torch.float64), motion)
        ours.append(float(corner_error(found.warp, truth)))
        theirs.append(float(corner_error(torch.from_numpy(estimate(points.numpy(), targets.numpy())), truth)))
    assert max(ours) < 1.5
    assert np.median(ours) < 1.1 * np.median(theirs)


def test_a_weighted_least_squares_without_outliers_is_scipys():
    optimize = pytest.importorskip("scipy.optimize")
    truth = motion_warp("affine", 3)
    points, targets, _ = matched(truth, wrong=0.0, noise=0.05, seed=3)
    weight = torch.from_numpy(np.random.default_rng(0).uniform(0.2, 1, len(points)))
    found = reweighted_fit(truth, Correspondences(points, targets, weight, SIZE), motion="affine", steps=40)
    # the same criterion at its optimum: its weights, and weighted least squares with them
    inner = found.weight.numpy()
    design = np.concatenate([points.numpy(), np.ones((len(points), 1))], 1)

    def residuals(parameters):
        return (np.sqrt(inner)[:, None] * (design @ parameters.reshape(3, 2) - targets.numpy())).ravel()

    best = (
        optimize.least_squares(residuals, np.zeros(6), xtol=1e-15, ftol=1e-15, gtol=1e-15).x.reshape(3, 2).T
    )
    np.testing.assert_allclose(found.warp.numpy(), best, atol=1e-6)


def test_the_mode_survives_what_mean_and_median_do_not():
    # a fifth of the matches agree; the others lie anywhere within a square of 60 px to one side
    random = np.random.default_rng(5)
    points = torch.from_numpy(random.uniform(0, 200, (400, 2)))
    shift = torch.tensor([3.3, -1.7], dtype=torch.float64)
    offset = random.uniform(-10, 50, (400, 2))
    offset[:80] = shift.numpy() + 0.2 * random.standard_normal((80, 2))
    offset = torch.from_numpy(offset)
    found = fit(points, points + offset, torch.ones(400, dtype=torch.float64), "translation")
    assert (found.warp[:, 2] - shift).norm() < 0.1
    assert (offset.mean(0) - shift).norm() > 1
    assert (offset.median(0).values - shift).norm() > 1
    assert (
        0.3 < float((found.warp[:, 2] - shift).norm() / (2**0.5 * largest_sigma(found.covariance))) < 3
        or largest_sigma(found.covariance) < 0.05
    )


@pytest.mark.parametrize("motion", ["translation", "similarity", "affine"])
def test_sigma_is_the_error(motion):
    # of the displacement of the centre, over many draws of the noise
    truth = motion_warp(motion, 2)
    centre = CENTRE[None]
    drawn = [matched(truth, 100, wrong=0.3, noise=0.3, seed=seed)[:2] for seed in range(40)]
    points, targets = (torch.stack(column) for column in zip(*drawn, strict=True))
    found = fit(points, targets, torch.ones(points.shape[:-1], dtype=torch.float64), motion)
    back = transform_points(truth, centre)
    errors = (transform_points(found.warp, centre) - back).squeeze(-2)
    ratio = (errors.square().sum(-1) / (2 * largest_sigma(found.covariance).square())).mean().sqrt()
    assert 0.7 < float(ratio) < 1.4


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_batch_is_frame_by_frame_and_padding_counts_nothing(motion):
    frames = [matched(motion_warp(motion, seed), 80, seed=seed)[:2] for seed in range(3)]
    points, targets = (torch.stack(column) for column in zip(*frames, strict=True))
    weight = torch.ones(3, 80, dtype=torch.float64)
    weight[1, ::3] = 0
    together = fit(points, targets, weight, motion)
    nested = fit(points[:, None], targets[:, None], weight[:, None], motion)
    assert torch.allclose(nested.warp[:, 0], together.warp, atol=1e-9)
    for t in range(3):
        alone = fit(points[t], targets[t], weight[t], motion)
        assert torch.allclose(alone.warp, together.warp[t], atol=1e-9)
        # rows of weight 0 may hold anything, at any place
        junk = torch.full((40, 2), 1e5, dtype=torch.float64)
        padded = fit(
            torch.cat((junk, points[t])),
            torch.cat((-junk, targets[t])),
            torch.cat((torch.zeros(40, dtype=torch.float64), weight[t])),
            motion,
        )
        assert torch.allclose(padded.warp, alone.warp, atol=1e-9)
        assert torch.equal(padded.inliers, alone.inliers)


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_too_little_to_fit_is_no_number_nowhere(motion, count):
    points, targets, _ = matched(motion_warp(motion), 20, wrong=0.0)
    weight = torch.zeros(4, 20)
    weight[0, :count] = 1
    same = points.float().expand(4, 20, 2).clone()
    same[1] = 7.0  # all in one place
    same[2, :, 1] = 50.0  # all in a line
    weight[1:3] = 1
    found = fit(same, targets.float().expand(4, 20, 2), weight, motion)
    assert found.warp.isfinite().all()
    assert found.weight.isfinite().all()
    assert not largest_sigma(found.covariance).isnan().any()
    if 2 * count <= PARAMETERS[motion]:  # nothing is left to tell how well they fit
        assert largest_sigma(found.covariance)[0].isinf()
    assert largest_sigma(found.covariance)[3].isinf()
    evidence = significance(found.inliers, found.matches, 0.01, motion=motion)
    assert (evidence[3] < 1).all()
    assert evidence[0] < 3
    nothing = identity_warp(homography=motion == "homography")
    torch.testing.assert_close(found.warp[3], nothing)


def test_significance_of_chance_and_of_truth():
    random = np.random.default_rng(7)
    points = torch.from_numpy(random.uniform(0, 200, (50, 300, 2)))
    radius = 8.0
    angle, length = random.uniform(0, 2 * np.pi, (50, 300)), radius * np.sqrt(random.uniform(size=(50, 300)))
    offset = torch.from_numpy(np.stack([length * np.cos(angle), length * np.sin(angle)], -1))
    weight = torch.ones(50, 300, dtype=torch.float64)
    found = fit(points, points + offset, weight, "translation")
    evidence = significance(found.inliers, found.matches, 1 / radius**2)
    assert evidence.max() < 6  # what unrelated frames reach: the highest of many densities
    offset[:, :40] = torch.tensor([2.0, 1.0], dtype=torch.float64)
    found = fit(points, points + offset, weight, "translation")
    assert significance(found.inliers, found.matches, 1 / radius**2).min() > 10


# ---------------------------------------------------------------------------------------------------- windows


def scene(warps, **options):
    """Analytic frames and the fields that windows are cut from."""
    data = pairs(warps, SIZE, dtype=torch.float64, **options)
    frames, reference = data.cube[:, 0], data.reference[0]
    return extract_texture(frames).field, extract_texture(reference).field


def places(count=100, seed=0):
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.uniform(24, np.array(SIZE[::-1]) - 24, (count, 2)))


def test_windows_find_a_small_shift():
    shift = torch.tensor([[0.3, -0.2], [0.0, 0.0], [-0.45, 0.4]], dtype=torch.float64)
    fields, reference = scene(shift)
    points = places().expand(3, 100, 2)
    found = window_ascent(fields, reference, points, torch.ones(3, 100, dtype=torch.float64), SIZE)
    assert found.converged.all()
    # fixed windows pull by a twentieth towards none, which is why the frames are brought together before
    assert (found.warp[..., 2] - shift).norm(dim=-1).max() < 0.04
    assert (largest_sigma(found.covariance) < 0.05).all()
    same = window_ascent(reference, reference, places(), torch.ones(100, dtype=torch.float64), SIZE)
    assert torch.equal(same.warp, identity_warp(dtype=torch.float64))


@pytest.mark.parametrize("motion", ["translation", "affine"])
def test_sigma_of_windows_is_their_error(motion):
    # the same ground, each time with other noise; windows that overlap count as what they are
    _, reference = scene(torch.zeros(1, 2))
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((24, *reference.shape)))
    points = places(100).expand(24, 100, 2)
    found = window_ascent(
        reference + 0.5 * noise,
        reference,
        points,
        torch.ones(24, 100, dtype=torch.float64),
        SIZE,
        motion=motion,
    )
    assert found.converged.all()
    errors = transform_points(found.warp, CENTRE[None]).squeeze(-2) - CENTRE
    ratio = (errors.square().sum(-1) / (2 * largest_sigma(found.covariance).square())).mean().sqrt()
    assert 0.4 < float(ratio) < 1.6  # σ is calibrated on frames, whose errors are larger than their scatter


@pytest.mark.parametrize("motion", MOTIONS[1:])
def test_windows_find_a_small_motion(motion):
    truth = torch.stack([motion_warp(motion, seed, large=0.012) for seed in range(3)])
    fields, reference = scene(truth)
    weight = torch.ones(3, 100, dtype=torch.float64)
    found = window_ascent(fields, reference, places().expand(3, 100, 2), weight, SIZE, motion=motion)
    assert found.converged.all()
    nothing = to_homogeneous(identity_warp(dtype=torch.float64))
    before = corner_error(nothing.expand(3, 3, 3), truth)
    after = corner_error(found.warp, truth)
    assert (before > 0.3).all()
    assert (after < 0.25 * before).all()


def test_windows_without_weight_are_not_asked():
    shift = torch.tensor([[0.2, 0.1]], dtype=torch.float64)
    fields, reference = scene(shift)
    points = places().unsqueeze(0)
    weight = torch.ones(1, 100, dtype=torch.float64)
    weight[:, ::2] = 0
    spoilt = fields.clone()
    plain = window_ascent(fields, reference, points, weight, SIZE)
    some = window_ascent(spoilt, reference, points[:, 1::2], weight[:, 1::2], SIZE)
    torch.testing.assert_close(plain.warp, some.warp, atol=1e-9, rtol=0)
    none = window_ascent(fields, reference, points, torch.zeros_like(weight), SIZE)
    assert not none.converged.any()
    assert torch.equal(none.warp[0], identity_warp(dtype=torch.float64))
    # what shows something else has no say: half of the frame from elsewhere
    spoilt[..., :, : spoilt.shape[-1] // 2] = spoilt[..., :, -(spoilt.shape[-1] // 2) :].flip(-1)
    robust = window_ascent(spoilt, reference, points, torch.ones_like(weight), SIZE)
    assert (robust.warp[..., 2] - shift).norm() < 0.02


def test_windows_in_the_same_place_tell_the_same():
    fields, reference = scene(torch.tensor([[0.2, 0.1]], dtype=torch.float64))
    noise = torch.from_numpy(np.random.default_rng(3).standard_normal(reference.shape))
    once, twice = (
        window_ascent(fields[0] + 0.3 * noise, reference, points, torch.ones(len(points)).double(), SIZE)
        for points in (places(60), places(60).repeat(2, 1))
    )
    torch.testing.assert_close(twice.warp, once.warp, atol=1e-9, rtol=0)
    assert float(largest_sigma(twice.covariance) / largest_sigma(once.covariance)) == pytest.approx(
        1, abs=0.05
    )


@pytest.mark.parametrize("size", [(8, 8), (16, 40), (33, 17)])
def test_windows_larger_than_the_frame(size):
    frames = torch.rand(2, *size, dtype=torch.float64)
    points = torch.rand(2, 5, 2, dtype=torch.float64) * 10
    found = window_ascent(frames, frames, points, torch.ones(2, 5, dtype=torch.float64), size)
    assert torch.equal(found.warp, identity_warp(2, dtype=torch.float64))


def test_windows_are_differentiable():
    fields, reference = scene(torch.tensor([[0.2, -0.15]], dtype=torch.float64))
    points, weight = places(12), torch.ones(12, dtype=torch.float64)

    def shift(field, other):
        # to the optimum, where the implicit function theorem holds
        return window_ascent(field, other, points, weight, SIZE, steps=12).warp[:, 2]

    # ω's own derivative is left out on purpose: the tolerance is what it is worth
    assert_derivative(shift, [fields[0], reference], directions=2, tolerance=2e-2)


def test_windows_and_fits_compose():
    # consensus → fit → windows, from points alone, as LGM does it
    truth = motion_warp("affine", 4)
    points, targets, _ = matched(truth, 120, wrong=0.4, noise=0.3, seed=4)
    weight = torch.ones(120, dtype=torch.float64)
    rough = fit(points, targets, weight, "affine")
    left = compose_warps(truth, torch.linalg.inv(to_homogeneous(rough.warp)))  # reference-to-reference
    data, reference = scene(left[None, :2])
    inside = ((targets > 20) & (targets < torch.tensor(SIZE[::-1]) - 20)).all(-1)
    found = window_ascent(
        data[0], reference, targets, rough.weight * inside, SIZE, motion="affine", windows=100
    )
    refined = compose_warps(rough.warp, found.warp)
    assert corner_error(rough.warp, truth) > 0.04
    assert corner_error(refined, truth) < 0.5 * corner_error(rough.warp, truth)


def test_translations_are_translations():
    points, targets, _ = matched(motion_warp("translation", 9))
    found = fit(points, targets, torch.ones(len(points), dtype=torch.float64), "translation")
    assert torch.equal(found.warp, translation_warp(found.warp[:, 2]))
