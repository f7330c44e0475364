"""What every aligner promises, whatever its method. A new method passes by one line in test_contract.py."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scenes import centre_errors, fractal_stack, pairs
from torch import Tensor

import torchalign as ta
from torchalign.aligner import Aligner
from torchalign.functional.affine import (
    center_displacement,
    compose_warps,
    identity_warp,
    invert_warp,
    translation_warp,
)
from torchalign.types import combine

NAN, INF = float("nan"), float("inf")
SIZE = (96, 104)  # even, not square, no power of two
FRAMES = 6
BAD = 1  # the frame that is spoilt

COMMON_OPTIONS = {
    "channel", "rgb_bands", "crop_center", "max_translation", "min_score",
    "interpolation", "padding_mode", "fill_value",
}  # fmt: skip


class Case(NamedTuple):
    """An aligner under contract."""

    make: Callable[..., Aligner]  # takes the common options
    accuracy: float = 0.05  # px, worst error on a clean textured stack of 96 × 104
    steadiness: float = 0.02  # px, worst change where part of a frame is missing
    grid: float = 0.0  # px, step of a method that picks from a grid, where rounding may choose the next point
    global_search: bool = True  # sees what lies beyond its limit, instead of climbing from where it starts


@functools.lru_cache(maxsize=4)
def stack(frames: int = FRAMES, clouds: float = 0.0, seed: int = 3):
    """Four bands, gains, offsets, noise, and shifts within 3 px."""
    return fractal_stack(frames, size=SIZE, bands=4, noise=0.002, cloud_fraction=clouds, seed=seed)


@functools.lru_cache(maxsize=64)
def plainly(case: Case, frames: int = FRAMES) -> ta.Alignment:
    """What the aligner makes of `stack(frames)`, to compare with: made once, and not to be written."""
    data = stack(frames)
    return case.make()(data.cube, data.reference)


def small_blocks(monkeypatch, aligner: Aligner, frames: int = 5) -> None:
    """Let the eager CPU cut a series into blocks of a few frames, as it does with one of hundreds."""
    monkeypatch.setattr(type(aligner), "_block_pixels", lambda self: frames * SIZE[0] * SIZE[1])


def spoil(cube: Tensor, kind: str, frame: int = BAD) -> Tensor:
    """A copy of the cube, one frame of which holds nothing to align."""
    cube = cube.clone()
    bad = cube[..., frame, :, :, :]
    if kind == "alternating":
        bad[..., ::3], bad[..., 1::3], bad[..., 2::3] = NAN, INF, -INF
    elif kind == "one pixel":
        bad.fill_(NAN)
        bad[..., 5, 5] = 0.3
    elif kind == "one band":
        bad[..., :, :] = 0.25
        bad[..., 1:, :, :] = NAN
    else:
        bad.fill_(float(kind))
    return cube


BAD_KINDS = [
    "nan",
    "0",
    "10000",
    "1e-30",
    "3e38",
    "alternating",
    "one pixel",
    "one band",
]


def shift_errors(estimate: ta.Estimate, shift: Tensor) -> Tensor:
    """(..., T): how far the displacement of the frame's centre is off, whatever the motion model."""
    return (center_displacement(estimate.warp, SIZE) - shift.to(estimate.warp)).norm(dim=-1)


def identity_like(warp: Tensor) -> Tensor:
    return identity_warp(homography=warp.shape[-2] == 3, dtype=warp.dtype).expand_as(warp)


def without(values: Tensor, frame: int) -> Tensor:
    """All frames but one, of (T, ...)."""
    return torch.cat((values[:frame], values[frame + 1 :]))


def assert_sound(estimate: ta.Estimate, limit: float) -> None:
    """What holds for any estimate of any data."""
    frames = estimate.status.shape
    assert estimate.warp.shape[: len(frames)] == frames
    assert estimate.warp.shape[-2:] in ((2, 3), (3, 3))
    numbers = {"score", "score_before", "sigma", "status", "stage"}
    assert {tuple(getattr(estimate, name).shape) for name in numbers} == {tuple(frames)}
    assert estimate.covariance.shape == (*frames, 2, 2)
    assert estimate.status.dtype == estimate.stage.dtype == torch.int64
    assert torch.equal(estimate.stage == -1, ~estimate.valid)
    assert estimate.warp.isfinite().all()
    assert estimate.score.isfinite().all()
    assert estimate.score_before.isfinite().all()
    assert not estimate.sigma.isnan().any()
    assert (estimate.sigma >= 0).all()
    assert estimate.sigma[estimate.valid].isfinite().all()
    assert estimate.sigma[~estimate.valid].isinf().all()
    assert torch.equal(estimate.covariance, estimate.covariance.mT)
    axes = torch.linalg.eigvalsh(estimate.covariance[estimate.valid].double())
    assert (axes >= -1e-6 * axes.abs().amax(-1, keepdim=True)).all()
    torch.testing.assert_close(
        estimate.sigma[estimate.valid].double(), axes[:, 1].clamp(min=0).sqrt(), rtol=1e-3, atol=1e-6
    )
    assert estimate.score.abs().le(1).all()
    assert estimate.score_before.abs().le(1).all()
    assert (estimate.score >= estimate.score_before)[estimate.valid].all()
    rejected = estimate.warp[~estimate.valid]
    assert torch.equal(rejected, identity_like(rejected))
    # the centre of any frame: the translation itself if the motion is one
    moved = center_displacement(estimate.warp, SIZE).norm(dim=-1)
    assert (moved <= limit + 1e-4).all()


def assert_same(case: Case, first: ta.Estimate, second: ta.Estimate, tolerance: float = 1e-3) -> None:
    tolerance += 1.01 * case.grid
    assert torch.equal(first.status, second.status)
    torch.testing.assert_close(first.warp, second.warp, atol=tolerance, rtol=0, check_dtype=False)
    torch.testing.assert_close(first.score, second.score, atol=1e-3 + case.grid, rtol=0, check_dtype=False)


def equal(first: Tensor, second: Tensor) -> bool:
    """Bit for bit, NaN and all."""
    return (
        first.dtype == second.dtype
        and torch.equal(first.nan_to_num(12345.0), second.nan_to_num(12345.0))
        and torch.equal(first.isnan(), second.isnan())
    )


class Results:
    """What comes out, for good data and bad, with any options. A subclass parametrises `case`."""

    # ------------------------------------------------------------------------------------------------ results

    def test_finds_the_shifts(self, case, device):
        data = stack()
        aligned, estimate = case.make()(data.cube.to(device), data.reference.to(device))
        assert aligned.shape == data.cube.shape
        assert aligned.device.type == estimate.warp.device.type == device.type
        assert estimate.valid.all()
        assert_sound(estimate.map(lambda field: field.cpu()), 5.0)
        assert shift_errors(estimate, data.shift).max() < case.accuracy

    def test_forward_is_estimate_then_warp(self, case):
        data = stack(3)
        for options in (
            {},
            {"interpolation": "bicubic", "padding_mode": "zeros"},
            {"interpolation": "nearest", "padding_mode": "reflection", "fill_value": -1.0},
        ):
            aligner = case.make(**options)
            aligned, estimate = aligner(data.cube, data.reference)
            again = aligner.estimate(data.cube, data.reference)
            assert all(torch.equal(one, other) for one, other in zip(estimate[:-1], again[:-1], strict=True))
            assert torch.equal(aligned, ta.warp(data.cube, estimate.warp, **options))

    def test_leading_dimensions(self, case):
        data = stack()
        cube = data.cube.reshape(2, 3, *data.cube.shape[1:])  # (B, T, C, H, W)
        single = plainly(case)
        references = {
            "shared": data.reference,
            "one per series": data.reference.expand(2, *data.reference.shape),
            "one per frame": data.reference.expand(cube.shape),
        }
        for name, reference in references.items():
            aligned, estimate = case.make()(cube, reference)
            assert aligned.shape == cube.shape, name
            assert estimate.status.shape == (2, 3), name
            flat = estimate.map(lambda field: field.flatten(0, 1))
            assert_same(case, flat, single.estimate, 1e-4)
            torch.testing.assert_close(aligned.flatten(0, 1), single.aligned, atol=1e-3, rtol=0)
        deep = case.make().estimate(cube[None, :, None], data.reference)  # (1, 2, 1, 3, C, H, W)
        assert deep.warp.shape == (1, 2, 1, 3, *single.estimate.warp.shape[-2:])
        assert_same(case, deep.map(lambda field: field.flatten(0, 3)), single.estimate, 1e-4)

    def test_a_reference_per_frame(self, case):
        data = stack()
        reference = data.cube.roll(1, 0)
        estimate = case.make(max_translation=8.0).estimate(data.cube, reference)
        truth = data.shift - data.shift.roll(1, 0)
        assert estimate.valid.all()
        assert shift_errors(estimate, truth).max() < 2 * case.accuracy

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
    def test_dtypes(self, case, dtype):
        data = stack()
        aligned, estimate = case.make()(data.cube.to(dtype), data.reference.to(dtype))
        assert aligned.dtype == dtype
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        assert {field.dtype for field in estimate[:5]} == {expected}
        assert estimate.valid.all()
        coarse = {torch.float16: 0.01, torch.bfloat16: 0.05}.get(
            dtype, 0.0
        )  # of the rounded image, not the method
        assert shift_errors(estimate, data.shift).max() < case.accuracy + coarse

    def test_half_precision_does_not_overflow(self, case):
        # digital numbers up to 50000 fit into float16; the sum of four bands does not
        data = stack()
        cube, reference = ((50000 * image.clamp(0, 1)).half() for image in (data.cube, data.reference))
        aligned, estimate = case.make()(cube, reference)
        assert estimate.valid.all()
        assert aligned.isfinite().all()
        assert shift_errors(estimate, data.shift).max() < case.accuracy + 0.01

    def test_order_of_frames(self, case):
        data = stack(clouds=0.3)
        cube = spoil(data.cube, "nan")
        order = torch.tensor([4, 2, 0, 5, 1, 3])
        estimate = case.make().estimate(cube, data.reference)
        shuffled = case.make().estimate(cube[order], data.reference)
        assert_same(case, shuffled, estimate.map(lambda field: field[order]))

    def test_number_of_frames_and_chunks(self, case, monkeypatch):
        frames = 8
        data = stack(frames, clouds=0.2, seed=7)
        cube = spoil(data.cube, "inf", 7)
        mask = data.clear | (
            torch.arange(frames)[:, None, None] % 2 == 0
        )  # every other frame's clouds are known
        aligner = case.make()
        aligned, estimate = aligner(cube, data.reference, mask)
        small_blocks(monkeypatch, aligner)
        for chunks in ((1, 5, 2), (frames,)):  # one, a block, a part of a block; all in blocks
            parts = [
                aligner(part, data.reference, usable)
                for part, usable in zip(cube.split(chunks), mask.split(chunks), strict=True)
            ]
            assert_same(
                case,
                combine(torch.cat, [part.estimate for part in parts]),
                estimate,
            )
            joined = torch.cat([part.aligned for part in parts])
            torch.testing.assert_close(joined, aligned, atol=2e-3, rtol=0, equal_nan=True)

    def test_chunks_of_a_long_series_of_references_and_inits(self, case, monkeypatch):
        # more pixels than a block of the estimate: what has a frame axis must be cut with the frames
        data = stack()
        repeats = 2
        cube, reference = data.cube.repeat(repeats, 1, 1, 1), data.cube.roll(1, 0).repeat(repeats, 1, 1, 1)
        mask = torch.ones(len(cube), *SIZE, dtype=torch.bool)
        mask[::5, :20] = False
        init = translation_warp((data.shift - data.shift.roll(1, 0)).repeat(repeats, 1) + 0.2)
        aligner = case.make(max_translation=9.0)
        small_blocks(monkeypatch, aligner)
        for given in (None, init):
            whole = aligner.estimate(cube, reference, mask, mask.flip(0), given)
            for t in (0, 4, 5, len(cube) - 1):
                row = slice(t, t + 1)
                one = aligner.estimate(
                    cube[row],
                    reference[row],
                    mask[row],
                    mask.flip(0)[row],
                    None if given is None else given[row],
                )
                assert_same(case, one, whole.map(lambda field, row=row: field[row]))

    def test_identical_frames(self, case):
        data = stack()
        cube = data.reference.expand(3, *data.reference.shape)
        aligned, estimate = case.make()(cube, data.reference)
        assert estimate.valid.all()
        assert torch.equal(estimate.warp, identity_like(estimate.warp))
        assert torch.equal(aligned, cube)
        torch.testing.assert_close(estimate.score, torch.ones(3), atol=1e-6, rtol=0)
        torch.testing.assert_close(estimate.score_before, torch.ones(3), atol=1e-6, rtol=0)

    def test_an_aligned_stack_is_aligned(self, case):
        data = stack()
        aligned, first = case.make(interpolation="bicubic")(data.cube, data.reference)
        second = case.make().estimate(aligned, data.reference)
        assert second.valid.all()
        assert center_displacement(second.warp, SIZE).norm(dim=-1).max() < case.accuracy
        there_and_back = compose_warps(first.warp, invert_warp(first.warp))
        torch.testing.assert_close(there_and_back, identity_like(there_and_back), atol=1e-5, rtol=0)

    def test_the_way_back_is_the_inverse(self, case):
        data = stack()
        there = case.make().estimate(data.cube, data.reference.expand(data.cube.shape))
        back = case.make().estimate(data.reference.expand(data.cube.shape), data.cube)
        assert centre_errors(back.warp, invert_warp(there.warp), SIZE).max() < case.accuracy

    # ---------------------------------------------------------------------------------------------- bad data

    @pytest.mark.parametrize("kind", BAD_KINDS)
    def test_a_bad_frame_is_left_alone_and_leaves_alone(self, case, kind):
        data, good = stack(3), plainly(case, 3)
        cube = spoil(data.cube, kind)
        aligned, estimate = case.make()(cube, data.reference)
        assert_sound(estimate, 5.0)
        assert estimate.status[BAD] != 0
        assert torch.equal(estimate.warp[BAD], identity_like(estimate.warp[BAD]))
        assert equal(aligned[BAD], cube[BAD])
        for name, field, expected in zip(
            estimate._fields[:-1], estimate[:-1], good.estimate[:-1], strict=True
        ):
            assert torch.equal(without(field, BAD), without(expected, BAD)), name
        assert torch.equal(without(aligned, BAD), without(good.aligned, BAD))

    def test_a_bad_frame_in_a_batch_of_series(self, case):
        data = stack()
        cube = data.cube.reshape(2, 3, *data.cube.shape[1:])
        spoilt = cube.clone()
        spoilt[1, 1] = NAN
        good, bad = case.make()(cube, data.reference), case.make()(spoilt, data.reference)
        assert bad.estimate.status[1, 1] != 0
        keep = torch.tensor([0, 1, 2, 3, 5])
        assert torch.equal(bad.aligned.flatten(0, 1)[keep], good.aligned.flatten(0, 1)[keep])
        assert torch.equal(bad.estimate.warp.flatten(0, 1)[keep], good.estimate.warp.flatten(0, 1)[keep])

    def test_a_wholly_masked_frame(self, case):
        data = stack()
        mask = torch.ones(FRAMES, *SIZE, dtype=torch.bool)
        good = case.make()(data.cube, data.reference, mask)
        mask[BAD] = False
        for options in ({}, {"fill_value": -5.0}):
            aligned, estimate = case.make(**options)(data.cube, data.reference, mask)
            assert estimate.status[BAD] == ta.Status.NO_TEXTURE
            assert torch.equal(estimate.warp[BAD], identity_like(estimate.warp[BAD]))
            assert torch.equal(aligned[BAD], data.cube[BAD])
            assert torch.equal(without(estimate.warp, BAD), without(good.estimate.warp, BAD))
            assert_sound(estimate, 5.0)

    @pytest.mark.parametrize("kind", BAD_KINDS)
    def test_a_bad_reference(self, case, kind):
        data = stack(3)
        reference = spoil(data.reference[None], kind, 0)[0]
        aligned, estimate = case.make()(data.cube, reference)
        assert_sound(estimate, 5.0)
        assert (estimate.status != 0).all()
        assert torch.equal(aligned, data.cube)

    def test_a_wholly_masked_reference(self, case):
        data = stack(3)
        estimate = case.make().estimate(data.cube, data.reference, None, torch.zeros(SIZE, dtype=torch.bool))
        assert (estimate.status == ta.Status.NO_TEXTURE).all()

    @pytest.mark.parametrize("size", [(1, 1), (1, 40), (3, 3), (5, 7), (200, 8), (17, 16)], ids=str)
    def test_tiny_images(self, case, size):
        # series of noise, of nothing, of NaN: the first two also without the third, which has a mask be made
        series = torch.stack(
            [torch.rand(2, 2, *size), torch.zeros(2, 2, *size), torch.full((2, 2, *size), NAN)]
        )
        for content in (series[:2], series):
            for crop in (None, 3):
                aligned, estimate = case.make(crop_center=crop)(content, content[:, 0])
                assert aligned.shape == content.shape
                assert estimate.warp.isfinite().all()
                assert estimate.score.isfinite().all()
                assert not estimate.sigma.isnan().any()
                assert equal(aligned[~estimate.valid], content[~estimate.valid])

    def test_no_frames(self, case):
        for shape in ((0, 4, *SIZE), (2, 0, 4, *SIZE), (0, 3, 4, *SIZE), (0, 4, 1, 1)):
            cube = torch.zeros(shape)
            reference = torch.zeros(*shape[:-4], *shape[-3:])
            mask = torch.ones(*shape[:-3], *shape[-2:], dtype=torch.bool)
            for given in (None, mask):
                aligned, estimate = case.make()(cube, reference, given)
                assert aligned.shape == shape
                assert estimate.warp.shape[:-2] == estimate.status.shape == shape[:-3]

    @pytest.mark.parametrize(
        "where", ["corner", "stripe", "wedge", "stripes", "scattered", "one pixel", "many scattered"]
    )
    def test_missing_pixels_do_not_pull(self, case, where):
        data = stack(3)
        # holes all over the frame leave little that is whole in an image as small as this
        allowed = case.steadiness * {"stripes": 1.5, "many scattered": 2}.get(where, 1)
        rows, columns = torch.arange(SIZE[0])[:, None], torch.arange(SIZE[1])
        missing = {
            "corner": (rows < 40) & (columns < 40),
            "stripe": ((columns >= 50) & (columns < 60)).expand(SIZE),
            "wedge": columns + 0.5 * rows > 110,
            "stripes": (rows + columns // 4) % 24 < 3,  # Landsat-7 since its scan line corrector failed
            "scattered": torch.rand(SIZE) < 0.005,
            "many scattered": torch.rand(SIZE) < 0.1,
            "one pixel": (rows == 50) & (columns == 50),
        }[where]
        whole = plainly(case, 3).estimate
        # NaN and both infinities side by side; then what only the mask tells, and NaN which it tells as well
        untold = torch.tensor([NAN, INF, -INF]).repeat(SIZE[1])[: SIZE[1]]
        for value, told in ((untold, False), (torch.tensor(-9999.0), True), (torch.tensor(NAN), True)):
            holed = torch.where(missing, value, data.cube)
            mask = ~missing if told else None
            aligned, estimate = case.make()(holed, data.reference, mask)
            assert estimate.valid.all(), (value, told)
            # less ground is less to go by; that the frames' common footprint does not pull is what counts
            assert shift_errors(estimate, center_displacement(whole.warp, SIZE)).max() < allowed, (
                value,
                told,
            )
            kept = aligned[:, 0].isfinite() & (aligned[:, 0] != -9999)
            assert 0 <= kept.float().mean() - (~missing).float().mean() + 0.1 < 0.2
            assert aligned[:, 0][kept].max() < 2  # nothing leaked through the warp

    def test_missing_in_the_reference_too(self, case):
        data = stack()
        reference = data.reference.clone()
        reference[:, :, 70:80] = NAN
        cube = data.cube.clone()
        cube[:, :, 20:30] = NAN
        whole = plainly(case).estimate
        estimate = case.make().estimate(cube, reference)
        assert estimate.valid.all()
        assert shift_errors(estimate, center_displacement(whole.warp, SIZE)).max() < 1.5 * case.steadiness

    def test_masks_broadcast(self, case):
        data = stack(3)
        aligner = case.make()
        ones = torch.ones((), dtype=torch.bool)
        plain = plainly(case, 3).estimate
        for shape in ((), (SIZE[1],), (SIZE[0], 1), SIZE, (1, *SIZE), (3, 1, 1), (3, *SIZE)):
            mask = ones.expand(shape)
            assert_same(case, aligner.estimate(data.cube, data.reference, mask, mask), plain)
        mask = torch.ones(3, 1, 1, dtype=torch.bool)
        mask[BAD] = False
        assert (aligner.estimate(data.cube, data.reference, mask).status != 0).tolist() == [
            t == BAD for t in range(3)
        ]

    # ------------------------------------------------------------------------------------------- invariances

    def test_gain_and_offset(self, case):
        data, plain = stack(3), plainly(case, 3).estimate
        # offsets in units of the gain: float32 holds seven digits
        changes = ((1e-4, 10.0), (1e-4, -10.0), (1.0, 10.0), (1e4, 0.0), (1e4, -10.0))
        for ours, theirs in zip(changes, changes[2:] + changes[:2], strict=True):
            cube, reference = (
                gain * (image + offset)
                for image, (gain, offset) in ((data.cube, ours), (data.reference, theirs))
            )
            assert_same(case, case.make().estimate(cube, reference), plain, 3e-3)
        exact = case.make().estimate(data.cube.double(), data.reference.double())
        for gain, offset in ((1e-4, -1e4), (1e-4, 1e4), (1.0, 1e4), (1e4, 1e-4)):
            changed = case.make().estimate(gain * data.cube.double() + offset, data.reference.double())
            assert_same(case, changed, exact)

    def test_digital_numbers_and_reflectance(self, case):
        data = stack()
        cube, reference = data.cube.clamp(0, 1), data.reference.clamp(0, 1)
        plain = case.make().estimate(cube, reference)
        assert_same(case, case.make().estimate(10000 * cube, 10000 * reference), plain)
        assert_same(case, case.make().estimate((10000 * cube).round(), reference), plain, 2e-3)

    def test_the_limit_is_kept(self, case):
        truth = torch.tensor(
            [[4.9, 0.0], [0.0, -5.3], [4.0, 4.0], [-9.0, 0.0], [12.5, -14.0], [0.4, 24.0], [1.0, -2.0]]
        )
        data = pairs(truth, (128, 120), bands=2, longest=24.0, seed=5)
        estimate = case.make(max_translation=5.0).estimate(data.cube, data.reference)
        moved = center_displacement(estimate.warp, (128, 120)).norm(dim=-1)
        assert (moved <= 5.0).all()
        beyond = truth.norm(dim=-1) > 5
        assert (estimate.status[beyond] == ta.Status.TOO_FAR).all() or not case.global_search
        assert (estimate.status[beyond] != 0).all()
        assert torch.equal(estimate.warp[beyond], identity_like(estimate.warp[beyond]))
        assert estimate.valid[~beyond].all()
        assert shift_errors(estimate, truth)[~beyond].max() < case.accuracy

    def test_min_score(self, case):
        data = stack()
        cube = data.cube.clone()
        cube[BAD] += 0.1 * torch.randn(cube[BAD].shape)
        free = case.make().estimate(cube, data.reference)
        low, high = float(free.score[BAD]), float(without(free.score, BAD).min())
        assert low < high
        level = 0.5 * (low + high)
        aligned, estimate = case.make(min_score=level)(cube, data.reference)
        assert (estimate.score[~(estimate.status == ta.Status.LOW_SCORE)] >= level).all()
        if free.valid[BAD]:
            assert estimate.status[BAD] == ta.Status.LOW_SCORE
        assert torch.equal(aligned[BAD], cube[BAD])
        assert without(estimate.valid, BAD).all()

    @pytest.mark.parametrize("crop", [95, 1000, (80, 104), (96, 79), [72, 90], np.int64(88)], ids=str)
    def test_crop_center(self, case, crop):
        data = stack(3)
        aligned, estimate = case.make(crop_center=crop)(data.cube, data.reference)
        assert aligned.shape == data.cube.shape
        assert estimate.valid.all()
        assert shift_errors(estimate, data.shift).max() < 1.5 * case.accuracy
        cube = data.cube.clone()
        size = (int(crop),) * 2 if isinstance(crop, (int, np.integer)) else tuple(crop)
        top, left = (max(0, (n - c) // 2) for n, c in zip(SIZE, size, strict=True))
        cube[..., :top, :], cube[..., :left] = NAN, NAN  # outside the crop, hence unseen
        assert torch.equal(case.make(crop_center=crop).estimate(cube, data.reference).warp, estimate.warp)


BAD_OPTIONS = [
    ({"max_translation": 0}, ValueError),
    ({"max_translation": -1.0}, ValueError),
    ({"max_translation": NAN}, ValueError),
    ({"max_translation": INF}, ValueError),
    ({"max_translation": "5"}, TypeError),
    ({"max_translation": True}, TypeError),
    ({"max_translation": None}, TypeError),
    ({"min_score": 1.5}, ValueError),
    ({"min_score": NAN}, ValueError),
    ({"min_score": "high"}, TypeError),
    ({"interpolation": "cubic"}, ValueError),
    ({"interpolation": None}, ValueError),
    ({"interpolation": ["nearest"]}, ValueError),
    ({"padding_mode": "wrap"}, ValueError),
    ({"fill_value": "nodata"}, TypeError),
    ({"fill_value": [0.0]}, TypeError),
    ({"channel": "red"}, ValueError),
    ({"channel": 1.5}, TypeError),
    ({"channel": None}, TypeError),
    ({"channel": True}, TypeError),
    ({"channel": np.bool_(True)}, TypeError),
    ({"channel": [0]}, TypeError),
    ({"rgb_bands": (3, 2)}, ValueError),
    ({"rgb_bands": 3}, TypeError),
    ({"rgb_bands": "abc"}, TypeError),
    ({"rgb_bands": (0.5, 1, 2)}, TypeError),
    ({"crop_center": 0}, ValueError),
    ({"crop_center": -8}, ValueError),
    ({"crop_center": 64.0}, TypeError),
    ({"crop_center": (64,)}, ValueError),
    ({"crop_center": (64, 64, 3)}, ValueError),
    ({"crop_center": (64, 0)}, ValueError),
    ({"crop_center": (64, 6.5)}, TypeError),
    ({"crop_center": "64"}, TypeError),
    ({"crop_center": True}, TypeError),
]  # fmt: skip


class Behaviour:
    """The module itself: starting points, copies, layouts, complaints. A subclass parametrises `case`."""

    # -------------------------------------------------------------------------------------------------- init

    def test_init_is_where_the_search_starts(self, case):
        truth = torch.tensor([[20.3, -1.2], [-19.6, 6.0], [0.4, 0.3]])
        data = pairs(truth, (128, 144), bands=2, longest=24.0, seed=2)
        init = translation_warp(truth + torch.tensor([[0.4, -0.3], [-0.3, -0.4], [0.2, 0.1]]))
        estimate = case.make(max_translation=32.0).estimate(data.cube, data.reference, init=init)
        assert estimate.valid.all()
        assert shift_errors(estimate, truth).max() < case.accuracy
        for dtype in (torch.float64, torch.float16):
            other = case.make(max_translation=32.0).estimate(data.cube, data.reference, init=init.to(dtype))
            assert_same(case, other, estimate, 2e-3)

    @pytest.mark.parametrize(("crop", "homography"), [(None, False), ((101, 120), True)], ids=str)
    def test_init_with_a_rotation(self, case, crop, homography):
        size = (128, 144)
        angle = torch.tensor([0.03, -0.02], dtype=torch.float64)
        truth = torch.stack([
            torch.stack([1.01 * angle.cos(), -angle.sin(), torch.tensor([3.0, -2.0])], -1),
            torch.stack([angle.sin(), angle.cos(), torch.tensor([-1.5, 2.5])], -1),
        ], -2)  # fmt: skip
        data = pairs(truth, size, bands=2, seed=4)
        # the linear part is known, the translation is off by (0.4, −0.3)
        init = truth.clone()
        init[..., 2] += torch.tensor([0.4, -0.3])
        if homography:
            last = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).expand(2, 1, 3)
            init = torch.cat([init, last], -2)
        aligner = case.make(max_translation=9.0, crop_center=crop, interpolation="bicubic")
        aligned, estimate = aligner(data.cube, data.reference, init=init.float())
        assert estimate.valid.all()
        assert centre_errors(estimate.warp[..., :2, :], truth, size).max() < 2 * case.accuracy
        inside = (..., slice(12, -12), slice(12, -12))
        assert (aligned - data.reference)[inside].abs().mean() < 0.1 * data.reference.std()

    def test_a_bad_init_does_no_harm(self, case):
        data = stack()
        good = translation_warp(data.shift)
        plain = case.make().estimate(data.cube, data.reference, init=good)
        for value in (NAN, INF, 0.0, 1e9):
            init = good.clone()
            init[BAD] = value
            aligner = case.make()
            aligned, estimate = aligner(data.cube, data.reference, init=init)
            assert_sound(estimate, 5.0)
            assert aligned.isfinite().all()
            assert torch.equal(without(estimate.warp, BAD), without(plain.warp, BAD))
            if estimate.status[BAD] == 0:
                assert shift_errors(estimate, data.shift)[BAD] < 0.5
            # a later stage may find what the first, whose start was no number, is not believed
            if value in (NAN, INF) and not isinstance(aligner, ta.Cascade):
                assert estimate.status[BAD] == ta.Status.NOT_CONVERGED

    # --------------------------------------------------------------------------------------------- the module

    def test_options_are_keyword_only_and_shown(self, case):
        aligner = case.make()
        kinds = (
            {type(stage) for stage in aligner.stages} if isinstance(aligner, ta.Cascade) else {type(aligner)}
        )
        for kind in kinds:
            self.check_options(kind, repr(case.make(max_translation=7.25, crop_center=(50, 60))))

    def check_options(self, kind, shown):
        parameters = list(inspect.signature(kind).parameters.values())
        assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters)
        assert {parameter.name for parameter in parameters} >= COMMON_OPTIONS
        with pytest.raises(TypeError, match="positional"):
            kind("mean")
        with pytest.raises(TypeError, match="no_such_option"):
            kind(no_such_option=1)
        for parameter in parameters:
            assert f"{parameter.name}=" in shown
        assert "max_translation=7.25" in shown
        assert "crop_center=(50, 60)" in shown

    def test_copies_are_the_same(self, case):
        data = stack()
        aligner = case.make(max_translation=4.5)
        expected = aligner.estimate(data.cube, data.reference)
        saved = io.BytesIO()
        torch.save(aligner, saved)
        saved.seek(0)
        loaded = case.make(max_translation=4.5)
        loaded.load_state_dict(aligner.state_dict())
        for other in (
            pickle.loads(pickle.dumps(aligner)),
            copy.deepcopy(aligner),
            torch.load(saved, weights_only=False),
            loaded,
            case.make(max_translation=4.5).to("cpu").eval(),
            torch.nn.Sequential(case.make(max_translation=4.5))[0],
        ):
            assert repr(other) == repr(aligner) or not other.training
            estimate = other.estimate(data.cube, data.reference)
            assert all(torch.equal(one, two) for one, two in zip(estimate[:-1], expected[:-1], strict=True))
        # a module's dtype is not the cube's
        assert_same(
            case,
            case.make(max_translation=4.5).double().half().estimate(data.cube, data.reference),
            expected,
            1e-4,
        )

    def test_no_state(self, case):
        data, other = stack(), stack(clouds=0.3)
        aligner = case.make()
        before = dict(vars(aligner))
        first = aligner.estimate(data.cube, data.reference)
        aligner(spoil(other.cube, "nan"), other.reference)
        again = aligner.estimate(data.cube, data.reference)
        assert all(torch.equal(one, two) for one, two in zip(first[:-1], again[:-1], strict=True))
        assert dict(vars(aligner)) == before

    def test_inputs_are_not_written(self, case):
        data = stack(clouds=0.3)
        mask = data.clear.clone()
        cube = data.cube.clone()
        cube[BAD, :, :30] = NAN
        init = translation_warp(data.shift + 0.2)
        given = (cube, data.reference.clone(), mask, data.clear[0].clone(), init)
        copies = [tensor.clone() for tensor in given]
        aligned, estimate = case.make()(*given[:4], init=init)
        estimate.warp.add_(1.0)
        aligned.add_(1.0)  # what comes back is not the input either, even where a frame was left alone
        assert all(equal(one, two) for one, two in zip(given, copies, strict=True))

    def test_autocast_inference_and_layouts(self, case):
        data = stack()
        aligner = case.make()
        aligned, expected = aligner(data.cube, data.reference)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = aligner(data.cube, data.reference)
        assert half.aligned.dtype == torch.float32
        assert_same(case, half.estimate, expected)
        with torch.inference_mode():
            assert_same(case, aligner(data.cube, data.reference).estimate, expected, 1e-6)
        strided = torch.zeros(FRAMES, 4, SIZE[0] * 2, SIZE[1] * 3)[..., ::2, ::3].copy_(data.cube)
        turned = data.cube.transpose(-1, -2).contiguous().transpose(-1, -2)
        last = data.cube.to(memory_format=torch.channels_last)
        for cube in (strided, turned, last):
            assert not cube.is_contiguous()
            other = aligner(cube, data.reference)
            assert_same(case, other.estimate, expected, 1e-4)
            torch.testing.assert_close(other.aligned, aligned, atol=1e-4, rtol=0)
        expanded = aligner(data.cube[:1].expand(3, *data.cube.shape[1:]), data.reference)
        assert expanded.estimate.valid.all()

    def test_gradients_reach_the_cube(self, case):
        data = stack()
        cube = spoil(data.cube, "nan").requires_grad_()
        reference = data.reference.clone().requires_grad_()
        aligned, _ = case.make()(cube, reference)
        without(aligned, BAD).square().mean().backward()
        keep = [t for t in range(FRAMES) if t != BAD]
        assert cube.grad[keep].isfinite().all()
        assert (cube.grad[keep].flatten(1).abs().sum(1) > 0).all()
        assert reference.grad is None or reference.grad.isfinite().all()

    # ---------------------------------------------------------------------------------------------- bad input

    def test_bad_options(self, case):
        for options, kind in BAD_OPTIONS:
            with pytest.raises(kind) as error:
                case.make(**options)
            assert_helpful(error, *options)

    def test_bad_arguments(self, case):
        cube, reference = torch.rand(3, 4, 32, 40), torch.rand(4, 32, 40)
        mask, init = torch.ones(3, 32, 40, dtype=torch.bool), identity_warp(3)
        good = {"cube": cube, "reference": reference, "mask": mask, "reference_mask": mask, "init": init}
        changes = {
            "cube list": (TypeError, cube.tolist()),
            "cube numpy": (TypeError, cube.numpy()),
            "cube integer": (TypeError, cube.to(torch.int16)),
            "cube complex": (TypeError, cube.to(torch.complex64)),
            "cube 3-D": (ValueError, cube[0]),
            "cube 0-D": (ValueError, cube[0, 0, 0, 0]),
            "cube no bands": (ValueError, cube[:, :0]),
            "cube no pixels": (ValueError, cube[..., :0]),
            "reference numpy": (TypeError, reference.numpy()),
            "reference dtype": (TypeError, reference.double()),
            "reference bands": (ValueError, reference[:3]),
            "reference size": (ValueError, reference[..., 1:]),
            "reference frames": (ValueError, cube[:2]),
            "reference device": (ValueError, reference.to("meta")),
            "mask float": (TypeError, mask.float()),
            "mask numpy": (TypeError, mask.numpy()),
            "mask size": (ValueError, mask[..., 1:]),
            "mask bands": (ValueError, mask[:, None].expand(3, 4, 32, 40)),
            "mask frames": (ValueError, mask[:2]),
            "mask device": (ValueError, mask.to("meta")),
            "reference_mask integer": (TypeError, mask.to(torch.uint8)),
            "reference_mask size": (ValueError, mask[:, 1:]),
            "init list": (TypeError, init.tolist()),
            "init integer": (TypeError, init.long()),
            "init one": (ValueError, init[0]),
            "init shape": (ValueError, init[..., :2]),
            "init frames": (ValueError, init[:2]),
            "init device": (ValueError, init.to("meta")),
            "channel index": (ValueError, 4),
            "channel -5": (ValueError, -5),
            "rgb_bands index": (ValueError, (4, 2, 1)),
            "channel shape": (ValueError, lambda cube: cube),
            "channel type": (TypeError, lambda cube: cube.numpy()),
            "channel integer": (ValueError, lambda cube: cube[..., 0, :, :].long()),
        }  # fmt: skip
        for what, (kind, value) in changes.items():
            name = what.split()[0]
            arguments, options = dict(good), {}
            if name in arguments:
                arguments[name] = value
            else:
                options = {"channel": "rgb_mean"} | {name: value}
            for call in ("forward", "estimate"):
                with pytest.raises(kind) as error:
                    getattr(case.make(**options), call)(**arguments)
                assert_helpful(error, name)


def assert_helpful(error: pytest.ExceptionInfo, name: str) -> None:
    """Which argument; what was expected; what came; what to do."""
    text = str(error.value)
    assert name in text.split(":")[0], text
    assert "expected" in text, text
    assert "got" in text.split("expected")[1], text
    assert text.split("got")[1].rpartition(";")[2].strip(), text
    assert ";" in text, text
