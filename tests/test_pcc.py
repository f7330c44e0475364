"""PCC's own options, derivatives and statuses. What every aligner promises is in contract.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from contract import assert_helpful
from scenes import (
    Waves,
    assert_derivative,
    centre_errors,
    fractal_stack,
    pairs,
    shift_errors,
    shifts_of,
)
from torch.nn import functional as F

import torchalign as ta
from torchalign.aligner import undo_init
from torchalign.functional.affine import center_displacement, change_origin, invert_warp, translation_warp

NAN, INF = float("nan"), float("inf")
Status = ta.Status


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"max_frequency": 0.0}, ValueError),
        ({"max_frequency": 0.51}, ValueError),
        ({"max_frequency": NAN}, ValueError),
        ({"max_frequency": "0.25"}, TypeError),
        ({"max_frequency": None}, TypeError),
        ({"weighting": "whiten"}, ValueError),
        ({"contrast": "global"}, ValueError),
        ({"contrast": True}, ValueError),
        ({"taper": -0.1}, ValueError),
        ({"taper": 1.1}, ValueError),
        ({"taper": "hann"}, TypeError),
        ({"robust": 1}, TypeError),
        ({"upsample_factor": 0}, ValueError),
        ({"upsample_factor": 1.5}, ValueError),
        ({"upsample_factor": -10}, ValueError),
        ({"upsample_factor": True}, TypeError),
        ({"upsample_factor": "50"}, TypeError),
        ({"max_sigma": 0.0}, ValueError),
        ({"max_sigma": NAN}, ValueError),
        ({"max_sigma": "0.15"}, TypeError),
    ],
    ids=str,
)
def test_bad_options(options, kind):
    with pytest.raises(kind) as error:
        ta.PCC(**options)
    assert_helpful(error, *options)


def test_options_of_numpy_are_numbers():
    aligner = ta.PCC(
        max_frequency=np.float32(0.25),
        taper=np.float64(0.2),
        upsample_factor=np.int64(10),
        max_translation=np.int32(4),
        min_score=np.float64(0.1),
        channel=np.int64(1),
        crop_center=(np.int64(60), np.int32(50)),
    )
    data = fractal_stack(2, size=(64, 72), bands=2)
    assert aligner.estimate(data.cube, data.reference).status.shape == (2,)
    assert "upsample_factor=10" in repr(aligner)


def test_doc_names_every_option():
    import inspect

    text = ta.PCC.__doc__
    for name in inspect.signature(ta.PCC).parameters:
        assert name in text


# ---------------------------------------------------------------------------------------------------- gradients


SMALL = [((30, 26), [[-0.4, 0.5]]), ((33, 37), [[0.7, -0.4]])]


def small(size, shifts, seed=1):
    data = pairs(shifts, size, dtype=torch.float64, scene=Waves(1, shortest=5.0, longest=16.0, seed=seed))
    return data.cube, data.reference


@pytest.mark.parametrize(
    ("contrast", "robust", "size", "shifts"),
    [
        ("local", True, *SMALL[0]),
        ("local", True, *SMALL[1]),
        ("local", False, *SMALL[0]),
        ("none", True, *SMALL[1]),
        ("none", False, *SMALL[1]),
    ],
)
def test_gradcheck(contrast, robust, size, shifts):
    cube, reference = small(size, shifts)
    aligner = ta.PCC(robust=robust, contrast=contrast)
    assert aligner.estimate(cube, reference).valid.all()

    def found(cube, reference):
        return aligner.estimate(cube, reference).warp[..., 2]

    assert_derivative(found, (cube, reference))

    # and pixel by pixel, in a window, to spare time
    def with_window(first, second):
        around = (8, size[1] - 11, 9, size[0] - 11)
        return found(cube + F.pad(first, around), reference + F.pad(second, around))

    windows = [torch.zeros(1, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(with_window, windows, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_gradcheck_of_the_aligned_cube_and_the_scores(interpolation):
    cube, reference = small((32, 28), [[-0.3, 0.9], [0.4, 0.3]])
    aligner = ta.PCC(interpolation=interpolation)

    def aligned(cube, reference):
        return aligner(cube, reference).aligned

    def scores(cube, reference):
        estimate = ta.PCC(robust=False).estimate(cube, reference)
        return torch.cat([estimate.score, estimate.score_before])

    assert_derivative(aligned, (cube, reference))
    # without inlier weights, which are taken as they are
    assert_derivative(scores, (cube, reference))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_gradcheck_of_warp(interpolation):
    cube = torch.rand(2, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    warp = translation_warp(torch.tensor([[0.3, -0.6], [1.2, 0.4]], dtype=torch.float64))
    warp[:, :, :2] += 0.01 * torch.randn(2, 2, 2, dtype=torch.float64)

    def warped(cube, warp):
        return ta.warp(cube, warp, interpolation=interpolation)

    assert torch.autograd.gradcheck(warped, (cube, warp.requires_grad_()))


def test_gradients_with_a_mask_and_of_bad_frames():
    cube, reference = small((32, 28), [[-0.3, 0.9], [0.4, 0.3], [1.0, 1.0], [0.2, -0.1]])
    mask = torch.ones(4, 32, 28, dtype=torch.bool)
    mask[0, :6, :6] = False
    aligner = ta.PCC()

    def found(cube, reference):
        return aligner.estimate(cube, reference, mask).warp[:2, :, 2]

    assert_derivative(found, (cube, reference))
    for value in (0.0, 0.4, NAN, INF):
        bad = cube.clone()
        bad[1] = value
        bad.requires_grad_()
        reference = reference.detach().requires_grad_()
        aligned, estimate = aligner(bad, reference)
        (aligned[[0, 2, 3]].sum() + estimate.warp.sum() + estimate.score.sum()).backward()
        assert bad.grad.isfinite().all(), value
        assert reference.grad.isfinite().all(), value


def test_a_loss_on_the_shift_can_be_descended():
    # what the derivative is for: move a frame until the registration says 0
    scene = Waves(1, shortest=6.0, longest=24.0)
    reference = pairs([[0.0, 0.0]], (48, 48), scene=scene).reference
    shift = torch.tensor([[0.8, -0.5]], requires_grad=True)
    optimizer = torch.optim.SGD([shift], lr=0.4)
    frame = reference[None]
    for _ in range(15):
        optimizer.zero_grad()
        moved = ta.warp(frame, translation_warp(shift), interpolation="bicubic")
        found = shifts_of(ta.PCC().estimate(moved, reference))
        found.square().sum().backward()
        optimizer.step()
    assert shift.detach().abs().max() < 0.05


# ----------------------------------------------------------------------------------------------------- statuses


def test_each_status_has_its_cause():
    data = fractal_stack(24, size=(128, 128), bands=1, noise=0.003, max_shift=12.0, seed=1)
    distance = data.shift.norm(dim=-1)
    cube = torch.stack(
        [
            data.cube[distance < 4.5][0],
            data.cube[distance > 7][0],
            torch.randn(1, 128, 128),
            torch.full((1, 128, 128), 0.4),
            torch.full((1, 128, 128), NAN),
        ]
    )
    aligned, estimate = ta.PCC()(cube, data.reference)
    names = [Status(code).name for code in estimate.status.tolist()]
    assert names == ["OK", "TOO_FAR", "NOT_CONVERGED", "NO_TEXTURE", "NO_TEXTURE"]
    assert torch.equal(aligned[1:4], cube[1:4])
    assert estimate.valid.tolist() == [True, False, False, False, False]
    assert ta.PCC(min_score=1.0).estimate(cube[:1], data.reference).status == Status.LOW_SCORE
    nothing = torch.zeros(5, 128, 128, dtype=torch.bool)
    assert (ta.PCC().estimate(cube, data.reference, nothing).status == Status.NO_TEXTURE).all()


@pytest.mark.parametrize("limit", [0.5, 1.0, 2.5, 6.0, 20.0])
@pytest.mark.parametrize("options", [{}, {"robust": False}, {"upsample_factor": 20}], ids=str)
def test_found_or_flagged_at_any_limit(limit, options):
    data = fractal_stack(24, size=(96, 96), bands=1, noise=0.01, max_shift=16.0, seed=6)
    estimate = ta.PCC(max_translation=limit, **options).estimate(data.cube, data.reference)
    assert (shifts_of(estimate).norm(dim=-1) <= limit + 1e-5).all()
    errors = shift_errors(estimate, data.shift)
    assert (errors[estimate.valid] < 0.3).all()
    truth = data.shift.norm(dim=-1)
    assert not estimate.valid[truth > limit + 0.3].any()
    near = truth < min(limit - 0.3, 10.0)
    assert estimate.valid[near].all()


def test_a_frame_that_was_rejected_is_not_filled():
    data = fractal_stack(3, size=(64, 72), bands=2)
    cube = data.cube.clone()
    cube[1, :, ::2] = NAN
    cube[1, :, 1::2] = 0.3
    aligned, estimate = ta.PCC(fill_value=-1.0)(cube, data.reference)
    assert estimate.valid.tolist() == [True, False, True]
    assert torch.equal(aligned[1].nan_to_num(7.0), cube[1].nan_to_num(7.0))
    assert (aligned[::2] == -1).any()  # what a warp leaves empty


def test_a_crop_is_refined_from_a_turn_that_is_known():
    angle = math.radians(30)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle), 0.7], [math.sin(angle), math.cos(angle), -0.6]])
    truth = change_origin(turn, (-63.5, -59.5))[None]
    data = pairs(truth, (120, 128), longest=24.0, seed=3)
    init = truth.clone()
    init[..., 2] += torch.tensor([0.9, -0.5])
    # about the crop's corner, or with the shift before the turn, it is another motion
    for crop in (None, 80):
        estimate = ta.PCC(crop_center=crop).estimate(data.cube, data.reference, init=init)
        assert estimate.valid.all()
        assert centre_errors(estimate.warp, truth, (120, 128)).max() < 0.05


def test_what_an_init_turns_into_the_frame_is_not_seen():
    # by 30° about the centre the corners come from outside
    init = change_origin(
        torch.tensor([[0.866, -0.5, 2.0], [0.5, 0.866, -1.0]], dtype=torch.float64), (-31.5, -23.5)
    )
    frame, mask = torch.rand(1, 48, 64, dtype=torch.float64), torch.ones(1, 48, 64, dtype=torch.bool)
    mask[:, 20:28, 30:34] = False
    y, x = np.mgrid[:48, :64]
    # the centred part: without the translation
    centred = init.clone()
    centred[:, 2] -= center_displacement(init, (48, 64))
    back = invert_warp(centred).numpy()
    source_x, source_y = (row[0] * x + row[1] * y + row[2] for row in back)
    seen = (source_x >= -0.5) & (source_x < 63.5) & (source_y >= -0.5) & (source_y < 47.5)
    moving, usable, start, _ = undo_init(init[None], frame, None)
    assert moving.isfinite().all()
    assert (usable[0].numpy() != seen).mean() < 0.002  # where it is a matter of rounding
    assert 0.7 < seen.mean() < 0.95
    torch.testing.assert_close(start[0], torch.tensor([2.0, -1.0], dtype=torch.float64))
    masked = undo_init(init[None], frame, mask)[1]
    assert not masked[0, 22:25, 31:33].any()
    assert (masked <= usable).all()


def test_max_sigma_flags_what_is_uncertain():
    data = fractal_stack(8, size=(96, 96), bands=1, noise=0.02, seed=4)
    free = ta.PCC(max_sigma=10.0).estimate(data.cube, data.reference)
    assert free.valid.all()
    level = float(free.sigma.median())
    strict = ta.PCC(max_sigma=level).estimate(data.cube, data.reference)
    assert torch.equal(strict.status, torch.where(free.sigma <= level, 0, int(Status.NOT_CONVERGED)))


def test_unrelated_frames_are_not_aligned():
    first, second = (
        fractal_stack(16, size=(96, 96), bands=1, seed=1),
        fractal_stack(16, size=(96, 96), bands=1, seed=2),
    )
    other = second.reference.flip(-1, -2)  # another place
    estimate = ta.PCC().estimate(first.cube, other)
    assert not estimate.valid.any()


def test_the_score_is_that_of_the_aligned_channel():
    data = fractal_stack(4, size=(96, 96), noise=0.01)
    aligned, estimate = ta.PCC(robust=False, interpolation="bicubic")(data.cube, data.reference)
    for t in range(4):
        margin = math.ceil(float(shifts_of(estimate)[t].abs().max())) + 1
        inside = (slice(margin, -margin),) * 2
        one, two = aligned[t].mean(0)[inside].numpy(), data.reference.mean(0)[inside].numpy()
        assert abs(np.corrcoef(one.ravel(), two.ravel())[0, 1] - float(estimate.score[t])) < 0.01
        # over the same ground
        before = np.corrcoef(data.cube[t].mean(0)[inside].numpy().ravel(), two.ravel())[0, 1]
        assert abs(before - float(estimate.score_before[t])) < 0.01


def test_warped_bands_are_all_bands():
    # the estimate sees one band, the warp moves every one, NaN bands too
    data = fractal_stack(3, size=(96, 96), bands=4, noise=0.003)
    cube = data.cube.clone()
    cube[:, 3] = NAN
    aligned, estimate = ta.PCC(channel=0)(cube, data.reference)
    assert estimate.valid.all()
    assert aligned[:, :3].isfinite().all()
    assert aligned[:, 3].isnan().all()
    inside = (..., slice(8, -8), slice(8, -8))
    gaps = [(aligned[:, band] - data.cube[:, band])[inside].abs().mean() for band in range(3)]
    assert min(gaps) > 0.005  # each was moved


def test_one_road_north():
    # satalign's gradient channel is blind to it; ours places it
    x = torch.arange(96.0)
    scene = Waves(1, shortest=8.0, longest=30.0)
    data = pairs([[1.5, 0.5]], (96, 96), scene=scene)
    roads = [torch.exp(-(((x - c) / 2) ** 2)).expand(1, 96, 96) for c in (48.0, 46.5)]
    reference, frame = 3 * roads[0] + 0.3 * data.reference, 3 * roads[1] + 0.3 * data.cube[0]
    estimate = ta.PCC(channel="gradients").estimate(frame[None], reference)
    assert estimate.valid.all()
    assert (shifts_of(estimate)[0] - torch.tensor([1.5, 0.5])).abs().max() < 0.1


@pytest.mark.parametrize(
    ("size", "seeds"), [((5, 7), (16, 28)), ((6, 6), (20, 33, 35, 58)), ((8, 8), (0, 1, 2))], ids=str
)
def test_gradients_of_tiny_frames_are_finite(size, seeds):
    """Of noise that fits by chance: sums of a divided correlation, or a determinant, are as good as 0 there."""
    for seed in seeds:
        draw = torch.Generator().manual_seed(seed)
        cube = torch.rand(2, 1, *size, generator=draw).requires_grad_()
        estimate = ta.PCC().estimate(cube, torch.rand(1, *size, generator=draw))
        (slope,) = torch.autograd.grad(estimate.warp.sum(), cube)
        assert slope.isfinite().all()


def test_the_cures_for_shapes_are_cures():
    cube = torch.rand(3, 2, 32, 32)
    with pytest.raises(
        ValueError, match=r"reference: .*got \(1, 2, 32, 32\); pass the frame, reference\[0\]$"
    ):
        ta.PCC()(cube, cube[:1])
    ta.PCC()(cube, cube[:1][0])
    with pytest.raises(
        ValueError, match=r"reference: .*got \(2, 1, 2, 32, 32\); pass the frame, reference\[:, 0\]$"
    ):
        ta.PCC()(cube.expand(2, 3, 2, 32, 32), cube[:1].expand(2, 1, 2, 32, 32))
    with pytest.raises(
        ValueError, match=r"cube\[None\] of one \(C, H, W\), cube\[:, None\] of one band \(T, H, W\)$"
    ):
        ta.PCC()(cube[0], cube[0])
    assert ta.PCC()(cube[0][None], cube[0]).aligned.shape == (1, 2, 32, 32)
    with pytest.raises(ValueError, match=r"'B03'; choose one, or name a band to ta\.align, bands=\['B03'\]$"):
        ta.PCC(channel="B03")
