"""A whole series without a reference."""

from __future__ import annotations

import functools
import io
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scenes import fractal, fractal_stack

import torchalign as ta
from torchalign.cube.sun import sun_position
from torchalign.functional import network
from torchalign.groupwise import Groupwise

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from seasons import simulate_seasons

SIZE = (96, 104)


def series(frames=8, size=SIZE, **options):
    return fractal_stack(
        frames, size=size, bands=2, **({"noise": 0.002, "max_shift": 2.0, "seed": 3} | options)
    )


def errors(estimate, shift):
    """(n,) of accepted frames, their common shift taken off."""
    error = (estimate.warp[..., :, 2].double() - shift)[estimate.valid]
    return (error - error.median(0).values).norm(dim=-1)


def test_frames_are_placed_without_a_reference():
    data = series(12)
    aligned, estimate = Groupwise(ta.PCC())(data.cube)
    assert estimate.valid.all()
    assert errors(estimate, data.shift).max() < 0.02
    assert (
        estimate.warp[:, :, 2].median(0).values.abs().max() < 0.5
    )  # the gauge: half a gap between two frames
    assert (estimate.score > estimate.score_before - 1e-3).all()
    assert estimate.score.min() > 0.9
    assert ((estimate.sigma > 0) & (estimate.sigma < 0.03)).all()
    torch.testing.assert_close(estimate.covariance.diagonal(dim1=-2, dim2=-1).amax(-1).sqrt(), estimate.sigma)
    assert (estimate.stage == 0).all()
    inner = aligned[..., 8:-8, 8:-8].flatten(-2)
    assert np.corrcoef(inner[:, 0])[0].min() > 0.97
    assert aligned.dtype == data.cube.dtype


def test_the_order_of_frames_does_not_matter():
    # seasons, clouds and change: what makes weights differ
    data = simulate_seasons(scene(700), frames=14, size=112, clouds=0.4, change=0.1, relief=0.5, seed=4)
    order = torch.randperm(14, generator=torch.Generator().manual_seed(1))
    method = Groupwise(ta.PCC(), neighbours=3, links=3)
    plain = method.solve(data.cube, data.clear, data.sun)
    mixed = method.solve(data.cube[order], data.clear[order], data.sun[order])
    assert torch.equal(mixed.estimate.status, plain.estimate.status[order])
    for name in ("warp", "score", "score_before", "covariance"):
        there, here = getattr(mixed.estimate, name), getattr(plain.estimate, name)[order]
        torch.testing.assert_close(there, here, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mixed.support, plain.support[order], atol=1e-3, rtol=0)


def scene(side=700):
    return fractal((side, side), bands=1)[0].numpy()


def test_foreign_and_overcast_frames_are_left_alone():
    data = series(16, size=(112, 112))
    torch.manual_seed(2)
    clouds = torch.nn.functional.avg_pool2d(torch.randn(3, 2, 132, 132), 21, 1)
    place = fractal((1200, 1200), bands=2, seed=31)[:, 300:860, 300:860]  # another place
    foreign = torch.stack([place[:, i : i + 448 : 4, i : i + 448 : 4] for i in (0, 5, 9, 14)])
    cube = torch.cat([data.cube, foreign, clouds[..., :112, :112]])
    aligned, estimate = Groupwise(ta.PCC())(cube)
    assert estimate.valid.tolist() == [True] * 16 + [False] * 7
    assert (estimate.status[16:] == ta.Status.NOT_CONNECTED).all()
    assert torch.equal(aligned[16:], cube[16:])
    assert (estimate.stage[16:] == -1).all()
    assert estimate.sigma[16:].isinf().all()
    assert errors(estimate, torch.cat([data.shift, torch.zeros(7, 2)])).max() < 0.02


@pytest.mark.parametrize("kind", [float("nan"), float("inf"), 0.0, 0.3, -9999.0, 1e30])
def test_bad_frames_come_back_as_they_were_and_touch_no_other(kind):
    data = series(8)
    cube = data.cube.clone()
    cube[3] = kind
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        aligned, estimate = Groupwise(ta.PCC())(cube)
    assert estimate.status[3] == ta.Status.NO_TEXTURE
    assert torch.equal(aligned[3].nan_to_num(7.0), cube[3].nan_to_num(7.0))
    assert torch.equal(estimate.warp[3], torch.eye(2, 3))
    assert estimate.valid.sum() == 7
    assert all(field.isfinite().all() for field in (estimate.warp, estimate.score, estimate.score_before))
    assert errors(estimate, data.shift).max() < 0.02


def test_what_fits_more_than_one_place_is_ambiguous():
    data = series(12, size=(128, 128))
    cube = data.cube.clone()
    # twice enlarged, all from one grid: the pattern of that grid fits itself at no motion
    cube[:4] = cube[:4, :, ::2, ::2].repeat_interleave(2, -1).repeat_interleave(2, -2)
    estimate = Groupwise(ta.PCC()).estimate(cube)
    assert estimate.valid.all()  # by those that were not enlarged
    error = estimate.warp[:, :, 2].double() - data.shift
    error = error - error[4:].median(0).values
    assert (error[:4] + 0.5).abs().max() < 0.05  # a sample now lies half a pixel beside where it was taken
    assert error[4:].abs().max() < 0.02
    alone = Groupwise(ta.PCC()).estimate(cube[:4])
    assert (alone.status == ta.Status.AMBIGUOUS).all()
    # stripes of one direction: known across them, not along
    wave = torch.nn.functional.avg_pool1d(
        torch.randn(1, 2, 140, generator=torch.Generator().manual_seed(3)), 5, 1
    )
    stripes = torch.stack([wave[0, :, i : i + 128, None].expand(2, 128, 128) for i in (0, 1, 2, 3)])
    noise = 0.01 * torch.randn(4, 2, 128, 128, generator=torch.Generator().manual_seed(1))
    striped = Groupwise(ta.PCC()).estimate(stripes + noise)
    assert (striped.status == ta.Status.AMBIGUOUS).all()
    mixed = Groupwise(ta.PCC()).estimate(torch.cat([data.cube, stripes + noise]))
    assert mixed.valid.tolist() == [True] * 12 + [False] * 4


def test_masks_act_in_the_estimate():
    data = series(10, size=(128, 128))
    cube, mask = data.cube.clone(), torch.ones(10, 128, 128, dtype=torch.bool)
    cube[2:6, :, 20:70, 30:90], mask[2:6, 20:70, 30:90] = torch.rand(4, 2, 50, 60), False
    estimate = Groupwise(ta.PCC()).estimate(cube, mask)
    assert estimate.valid.all()
    assert errors(estimate, data.shift).max() < 0.03


@pytest.mark.parametrize("frames", [0, 1, 2, 3])
def test_few_frames(frames):
    data = series(4)
    cube = data.cube[:frames]
    aligned, estimate = Groupwise(ta.PCC())(cube)
    assert aligned.shape == cube.shape
    assert estimate.warp.shape == (frames, 2, 3)
    if frames == 1:  # there is nothing it could be connected with
        assert estimate.status.tolist() == [ta.Status.NOT_CONNECTED]
    elif frames:
        assert estimate.valid.all()
        assert errors(estimate, data.shift[:frames]).max() < 0.03


def test_a_batch_of_series_is_its_members():
    first, second = series(6), series(6, seed=8)
    cube = torch.stack([first.cube, second.cube])
    mask = torch.rand(2, 6, *SIZE, generator=torch.Generator().manual_seed(0)) > 0.05
    method = Groupwise(ta.PCC(), neighbours=2, links=2)
    aligned, estimate = method(cube, mask)
    assert estimate.covariance.shape == (2, 6, 2, 2)
    for one in range(2):
        own, alone = method(cube[one], mask[one])
        torch.testing.assert_close(aligned[one], own)
        torch.testing.assert_close(estimate.warp[one], alone.warp)
        assert torch.equal(estimate.status[one], alone.status)


def test_frames_may_be_seen_a_few_at_a_time():
    data = series(9)
    cube = data.cube.clone()
    cube[7, :, 5:20, 5:20] = torch.nan  # one part with weights, others without
    method = Groupwise(ta.PCC())
    joined = method.join([method.see(cube[first : first + 4]) for first in (0, 4, 8)])
    parts, whole = method.place(joined), method.solve(cube)
    torch.testing.assert_close(parts.estimate.warp, whole.estimate.warp, atol=1e-4, rtol=0)
    assert torch.equal(parts.estimate.status, whole.estimate.status)


@pytest.mark.parametrize(
    "aligner",
    [
        lambda: ta.ECC(),
        lambda: ta.Cascade(ta.PCC(), ta.ECC()),
        lambda: ta.PCC(contrast="structure"),
        lambda: ta.PCC(channel=1, crop_center=80, robust=False),
    ],
    ids=["ECC", "Cascade", "structure", "options"],
)
def test_any_aligner_of_translations(aligner):
    data = series(6)
    method = Groupwise(aligner(), neighbours=2, links=2)
    estimate = method.estimate(data.cube)
    assert estimate.valid.all()
    assert errors(estimate, data.shift).max() < 0.06
    assert method.join([method.see(data.cube[:3]), method.see(data.cube[3:])]).texture.flat.shape == (6,)


def test_only_shifts_within_the_limit():
    data = series(8)
    cube = data.cube.clone()
    cube[0] = cube[0].roll(9, -1)  # 9 px away from all others
    method = Groupwise(ta.PCC(max_translation=5.0))
    assert method.estimate(cube).status[0] == ta.Status.NOT_CONNECTED  # no pair reaches so far
    wide = Groupwise(ta.PCC(max_translation=14.0))
    assert wide.estimate(cube).valid.all()


def test_min_score_and_fill():
    data = series(6)
    method = Groupwise(ta.PCC(min_score=1.0, fill_value=-5.0))
    aligned, estimate = method(data.cube)
    assert (estimate.status == ta.Status.LOW_SCORE).all()
    assert torch.equal(aligned, data.cube)
    aligned, _ = Groupwise(ta.PCC(fill_value=-5.0))(data.cube)
    assert (aligned == -5).any()


def test_frames_that_are_added_must_reach_the_min_score_too():
    data = series(6)
    method = Groupwise(ta.PCC(min_score=1.0))
    old, new = method.see(data.cube[:4]), method.see(data.cube[4:])
    known = torch.zeros(4, 2), torch.full((4,), 0.01), torch.ones(4, dtype=torch.bool)
    estimate = method.extend(new, old, *known).estimate
    assert (estimate.status == ta.Status.LOW_SCORE).all()
    assert (estimate.warp[..., 2] == 0).all()
    assert estimate.sigma.isinf().all()
    alone = method.extend(new, method.see(data.cube[:0]), *(known[:0] for known in known))
    assert (alone.estimate.status == ta.Status.NOT_CONNECTED).all()
    assert alone.season_shift.shape == (2, 2)


def test_no_series_at_all():
    aligned, estimate = Groupwise(ta.PCC())(torch.rand(0, 5, 1, *SIZE))
    assert aligned.shape == (0, 5, 1, *SIZE)
    assert estimate.warp.shape == (0, 5, 2, 3)
    assert estimate.status.shape == (0, 5)


# ---------------------------------------------------------------------------------------------------- the sun


@pytest.mark.parametrize(
    ("time", "latitude", "longitude", "elevation", "azimuth"),
    [  # from pvlib 0.16.1, nrel_numpy, without refraction
        ("1996-01-15T09:50", 46.0, 14.5, 20.31, 159.83),
        ("2017-06-21T10:05", 46.0, 14.5, 64.50, 147.26),
        ("2020-03-20T18:30", -33.9, 18.4, -19.95, 256.21),
        ("2023-12-21T15:00", 40.0, -105.3, 5.62, 127.18),
        ("2008-02-29T02:15", -1.3, 116.8, 56.88, 102.47),
        ("2040-09-05T23:45", 64.1, -149.0, 28.88, 211.81),
        ("2016-11-02T13:20", -54.8, -68.3, 37.63, 58.23),
    ],
)
def test_where_the_sun_stands(time, latitude, longitude, elevation, azimuth):
    found = sun_position(np.datetime64(time), latitude, longitude)
    assert found == (pytest.approx(elevation, abs=0.03), pytest.approx(azimuth, abs=0.03))


def test_no_time_no_sun():
    elevation, azimuth = sun_position(np.array(["NaT", "2020-01-01"], "datetime64[ns]"), 0.0, 0.0)
    assert np.isnan(elevation).tolist() == np.isnan(azimuth).tolist() == [True, False]


@pytest.fixture(scope="module")
def hills():
    """(series, truth) of a scene with relief that shows."""
    return simulate_seasons(scene(900), frames=24, size=150, relief=2.0, seed=11, jitter=0.2, farthest=1.0)


def test_the_suns_part_is_reported_and_corrected(hills):
    found = {
        season: Groupwise(ta.PCC(), season=season).solve(hills.cube, sun=hills.sun)
        for season in ("none", "report", "correct")
    }
    none, report, correct = (found[season] for season in ("none", "report", "correct"))
    torch.testing.assert_close(none.estimate.warp, report.estimate.warp)
    assert (none.season_shift == 0).all()
    assert report.season_shift.norm(dim=-1).max() > 0.05
    assert (report.estimate.sigma > none.estimate.sigma).all()
    assert (report.sigma_season <= report.estimate.sigma + 1e-6).all()
    plain, corrected = (errors(one.estimate, hills.shift) for one in (report, correct))
    assert corrected.square().mean() < 0.7 * plain.square().mean()
    moved = (report.estimate.warp - correct.estimate.warp)[..., 2] - report.season_shift
    torch.testing.assert_close(moved, moved.median(0).values.expand_as(moved), atol=1e-4, rtol=0)
    blind = Groupwise(ta.PCC()).solve(hills.cube)  # without a sun the blocks still tell that they disagree
    assert (blind.sigma_season > 0).any()
    assert (blind.season_shift == 0).all()


def test_without_relief_nothing_is_corrected():
    data = simulate_seasons(scene(900), frames=20, size=150, seed=12)
    found = Groupwise(ta.PCC(), season="correct").solve(data.cube, sun=data.sun)
    assert found.estimate.valid.all()
    assert (found.season_shift == 0).all()


# ---------------------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"aligner": "pcc"}, TypeError, "aligner: expected an aligner"),
        ({"aligner": ta.ECC(motion="affine")}, ValueError, "translation"),
        ({"aligner": ta.Cascade(ta.PCC(), ta.ECC(motion="euclidean"))}, ValueError, "translation"),
        ({"aligner": ta.Cascade(ta.PCC(), ta.Local())}, ValueError, "translation"),
        ({"neighbours": 0}, ValueError, "neighbours"),
        ({"links": 1.5}, TypeError, "links"),
        ({"season": "remove"}, ValueError, "season"),
    ],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        Groupwise(**({"aligner": ta.PCC()} | options))


@pytest.mark.parametrize(
    ("sun", "error", "match"),
    [
        (None, ValueError, "sun: expected .*correct"),
        ([1.0], TypeError, "sun"),
        (torch.ones(4, 2, dtype=torch.int64), TypeError, "sun"),
        (torch.ones(3, 2), ValueError, "sun"),
    ],
)
def test_bad_suns(sun, error, match):
    with pytest.raises(error, match=match):
        Groupwise(ta.PCC(), season="correct")(torch.rand(4, 1, 32, 32), sun=sun)


def test_bad_cubes():
    method = Groupwise(ta.PCC())
    with pytest.raises(ValueError, match="cube"):
        method(torch.rand(4, 32, 32))
    with pytest.raises(TypeError, match="mask"):
        method(torch.rand(4, 1, 32, 32), torch.ones(4, 32, 32))


# ---------------------------------------------------------------------------------------- devices and programs


@pytest.fixture
def few_steps(monkeypatch):
    """Loops of a fixed number of steps are long programs, and all steps are alike."""
    monkeypatch.setattr(network, "solve_positions", functools.partial(network.solve_positions, steps=2))
    monkeypatch.setattr(network, "fit_slope", functools.partial(network.fit_slope, steps=2))


@pytest.mark.parametrize("season", [pytest.param("correct", marks=pytest.mark.slow), "none"])
def test_fake_cuda(few_steps, fake, season):
    method = Groupwise(ta.PCC(), neighbours=2, links=1, season=season)
    cube = torch.empty(1, 5, 2, *SIZE, device="cuda")
    mask = torch.empty(1, 5, *SIZE, dtype=torch.bool, device="cuda")
    sun = torch.empty(5, 2, device="cuda")
    with torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16):
        for given in ((cube, None, sun), (cube[0].double(), mask[0], sun.double())):
            aligned, estimate = method(*given)
            assert aligned.shape == given[0].shape
            assert {field.device.type for field in estimate[:-1]} == {"cuda"}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["compiled", "exported"])
def test_compiled_and_exported(few_steps, way):
    data = series(4, size=(64, 64))
    # (the defaults of PCC are traced in test_devices.py)
    method = Groupwise(ta.PCC(robust=False, contrast="none"), neighbours=2, links=1, season="none")
    expected = method.estimate(data.cube)
    assert expected.valid.all()
    if way == "compiled":
        found = torch.compile(method, fullgraph=True, backend="eager")(data.cube)[1]
    else:
        program = torch.export.export(method, (data.cube,), strict=False)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        found = torch.export.load(file).module()(data.cube)[1]
    assert torch.equal(found.status, expected.status)
    torch.testing.assert_close(found.warp, expected.warp, atol=1e-3, rtol=0)


def test_differentiable_by_the_cube():
    data = series(4, size=(64, 64))
    cube = data.cube.double().requires_grad_()
    method = Groupwise(ta.PCC(), neighbours=2, links=1)
    shift = method.estimate(cube).warp[0, 0, 2]
    (slope,) = torch.autograd.grad(shift, cube)
    direction = torch.randn(cube.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        ahead, behind = (
            method.estimate(cube + sign * 1e-4 * direction).warp[0, 0, 2].double() for sign in (1, -1)
        )
    assert slope.isfinite().all()
    # the weights of pairs and of ground move a little, too, which the derivative leaves out
    assert float((slope * direction).sum()) == pytest.approx(float(ahead - behind) / 2e-4, rel=0.3)
