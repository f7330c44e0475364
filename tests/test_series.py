"""The workflow of a series: references made of its frames, one solution for many cubes, the report that travels."""

from __future__ import annotations

import csv
import json
import sys

import numpy as np
import pytest
import torch
import xarray as xr
from scenes import fractal_stack
from series import UTM, align, make_series
from torch import nn

import torchalign as ta
import torchalign.xr
from torchalign.cube.georeference import Georeference, find_georeference, regrid_warp
from torchalign.cube.labels import Cube
from torchalign.cube.solution import report_georeference
from torchalign.functional.affine import compose_warps, invert_warp, transform_points, translation_warp
from torchalign.pictures import style
from torchalign.report import as_report
from torchalign.types import Alignment, Estimate, Status


def shifts(report):
    return np.stack([report.shift_x, report.shift_y], -1).astype(np.float64)


def error(report, truth):
    """Root mean square distance from the truth once a common offset is removed, over all frames."""
    assert (report.status == 0).all()
    apart = shifts(report) - truth
    return np.sqrt(((apart - apart.mean(0)) ** 2).sum(1).mean())


class Fixed(nn.Module):
    """Finds the warps that it was told, whatever it sees; the last frames are flagged."""

    def __init__(self, warp, flagged=0):
        super().__init__()
        self.warp, self.flagged, self.inits = warp, flagged, []

    def forward(self, cube, reference, mask=None, reference_mask=None, *, init=None):
        self.inits.append(init)
        warp, frames = self.warp.to(cube), len(cube)
        status = torch.zeros(frames, dtype=torch.int64)
        status[frames - self.flagged :] = Status.NO_TEXTURE
        ones = cube.new_ones(frames)
        identity = torch.eye(warp.shape[-2], 3)
        warp = torch.where(status[:, None, None] == 0, warp, identity)
        aligned = ta.warp(cube, warp)
        return Alignment(
            aligned,
            Estimate(
                warp,
                ones,
                0.5 * ones,
                0.1 * ones,
                0.01 * torch.eye(2).expand(frames, 2, 2),
                status,
                0 * status,
            ),
        )


# --- references ---


@pytest.fixture(scope="module")
def cloudy():
    """Displaced by more than a pixel, a third of it under clouds that are masked."""
    return make_series(16, 80, bands=1, dtype="float32", cloud_fraction=0.3, max_shift=3.0, seed=2)


def test_medians_beat_the_first_frame(cloudy):
    found = {
        name: error(align(cloudy.cube, name, mask=cloudy.clear, verify=False)[1], cloudy.shift)
        for name in ("first", "median", "iterative")
    }
    for name in ("median", "iterative"):
        assert found[name] < 0.9 * found["first"]
        assert found[name] < 0.02


def test_a_median_under_clouds_does_not_hold_frames_where_they_lie():
    """Pixels of a frame that show in the median fit that frame as it lies: frames are placed by their pairs before."""
    series = make_series(16, 128, bands=1, dtype="float32", cloud_fraction=0.4, seed=1)

    def errors(reference):
        _, report = align(series.cube, reference, verify=False)
        kept = (report.status == 0).values
        apart = (shifts(report) - series.shift)[kept]
        return np.linalg.norm(apart - np.median(apart, 0), axis=1), report.sigma.values[kept]

    placed, sigma = errors("median")
    assert len(placed) >= 15
    assert (placed < 4 * sigma).all()
    assert placed.max() < 0.15
    plain, _ = errors(series.cube.median("time"))
    assert plain.max() > 0.5


def test_a_median_of_frames_that_have_no_place_is_of_them_as_they_are():
    series = make_series(6, 64, bands=1, dtype="float32", nodata=None)
    values = np.random.default_rng(0).random(series.cube.shape).astype("f4")
    _, report = align(series.cube.copy(data=values), "median", verify=False)
    assert report.attrs["reference"] == "median (of all frames as they are: pairs place 0)"
    _, report = align(series.cube, "median", verify=False)
    assert report.attrs["reference"] == "median (of 6 of 6 frames, placed by their pairs)"


def test_what_no_placed_frame_shows_is_of_the_others():
    """Swaths: six frames show the left, four the right, and no pair has ground in common."""
    series = make_series(10, 96, bands=1, dtype="float32", nodata=None, max_shift=0.0, noise=0.0)
    cube = series.cube.copy(deep=True)
    cube[:6, ..., 48:], cube[6:, ..., :48] = np.nan, np.nan
    _, report = align(cube, "median", verify=False)
    assert report.attrs["reference"] == "median (of 6 of 10 frames, placed by their pairs)"
    assert (report.status == 0).all()


def test_pairs_see_the_centre_of_large_frames_a_few_at_a_time(monkeypatch):
    from torchalign.cube import series as _series
    from torchalign.groupwise import Groupwise

    seen, see = [], Groupwise.see

    def spy(self, cube, mask=None):
        seen.append(tuple(cube.shape))
        return see(self, cube, mask)

    monkeypatch.setattr(Groupwise, "see", spy)
    for name, value in (("_PLACED_SAMPLES", 2**12), ("_LEAST_PLACED", 64), ("_READ_BYTES", 2 * 64 * 64 * 4)):
        monkeypatch.setattr(_series, name, value)
    made = make_series(12, 100, bands=1, dtype="float32", nodata=None, max_shift=1.0)
    mask = made.clear.copy(data=np.ones(made.clear.shape, bool))
    _, report = align(made.cube, "median", mask=mask, verify=False)
    assert seen == 6 * [(2, 1, 64, 64)]
    seen.clear()
    _, lazy = align(made.cube.chunk(time=-1), "median", mask=mask, verify=False)
    assert seen == 6 * [(2, 1, 64, 64)]
    np.testing.assert_array_equal(lazy.warp, report.warp)
    _, report = align(made.cube, "median", ta.PCC(max_translation=1e6, crop_center=80), verify=False)
    assert (report.status == 0).all()


def test_positions_are_relative_to_their_median():
    from torchalign.cube.reference import Found, _anchor

    place = torch.tensor([[3.0, -2.0], [3.5, -2.5], [9.0, 9.0], [2.5, -1.0]])
    valid = torch.tensor([True, True, False, True])
    warp = _anchor(Found(translation_warp(place), valid)).warp
    torch.testing.assert_close(warp[valid, :, 2], place[valid] - place[valid].median(0).values)
    assert warp[2].equal(translation_warp(place[2]))


def test_frames_that_lie_well_are_in_the_median_as_they_are():
    series = make_series(5, 64, bands=1, dtype="float32", nodata=None, max_shift=0.0, noise=0.0)
    assert (align(series.cube, "median", verify=False)[1].warp.values == np.eye(2, 3)).all()


def test_a_common_offset_changes_nothing(cloudy):
    """All frames displaced by the same whole pixels: cut from one scene, so nothing wraps or is interpolated."""
    size, results = 64, {}
    for x, y in ((8, 8), (5, 12)):
        window = {"y": slice(y, y + size), "x": slice(x, x + size)}
        cube = cloudy.cube.isel(window)
        cube = cube.assign_coords(x=np.arange(size), y=np.arange(size))
        mask = cloudy.clear.isel(window).values
        results[x] = align(cube, "iterative", mask=mask, verify=False)[1]
    first, second = results.values()
    assert (first.status == 0).all()
    assert (second.status == 0).all()
    assert np.abs(shifts(first) - shifts(second)).max() < 0.15  # other ground at the borders, no more
    assert np.abs((shifts(first) - shifts(second)).mean(0)).max() < 0.02
    # and it is anchored: the median frame stays where it is
    assert np.abs(np.median(shifts(first), 0)).max() < 0.02


def test_iterative_does_not_depend_on_the_order_of_frames(cloudy):
    cube, mask = cloudy.cube.isel(time=slice(8)), cloudy.clear.isel(time=slice(8))
    order = [3, 1, 7, 0, 6, 2, 5, 4]
    aligned, report = align(cube, "iterative", mask=mask)
    again, other = align(cube.isel(time=order), "iterative", mask=mask.isel(time=order))
    np.testing.assert_allclose(shifts(other), shifts(report)[order], atol=1e-4)
    np.testing.assert_allclose(again.values, aligned.values[order], atol=1e-3)


def test_iterative_leaves_out_frames_that_show_nothing(monkeypatch):
    monkeypatch.setattr("torchalign.cube.series.PairPositions.prefers", lambda *given: True)
    series = make_series(8, 64, bands=1, dtype="float32", nodata=None)
    series.cube[2] = 0.5
    series.cube[5] = np.random.default_rng(0).random((1, 64, 64)).astype("f4")
    aligned, report = align(series.cube, "iterative")
    good = [0, 1, 3, 4, 6, 7]
    assert report.status.values[good].tolist() == [0] * 6
    assert report.status.values[2] == Status.NO_TEXTURE
    assert report.status.values[5] != Status.OK
    np.testing.assert_array_equal(aligned[2], series.cube[2])
    assert error(report.isel(time=good), series.shift[good]) < 0.03
    assert report.attrs["reference"].startswith("iterative (")


def test_frames_that_were_rejected_are_not_in_the_next_median(monkeypatch):
    series, seen = make_series(5, 64, bands=1, dtype="float32", nodata=None), []
    series.cube[3] = 0.5
    original = torchalign.xr.find_reference

    def spy(reference, reader, estimate, pairs):
        seen.append(estimate(original("median", reader, estimate, pairs)))
        return original(reference, reader, estimate, pairs)

    monkeypatch.setattr(torchalign.xr, "find_reference", spy)
    _, report = align(series.cube, "median")
    assert seen[0].valid.tolist() == (report.status == 0).values.tolist() == [True, True, True, False, True]


def test_iterative_on_frames_of_which_none_is_usable():
    cube = make_series(3, 32, dtype="float32").cube
    blank = cube.copy(data=np.full(cube.shape, np.nan, "f4"))
    aligned, report = align(blank, "iterative")
    xr.testing.assert_identical(aligned, blank)
    assert (report.status == Status.NO_TEXTURE).all()
    empty, report = align(cube.isel(time=[]), "iterative")
    assert (empty.sizes["time"], report.sizes["time"]) == (0, 0)


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_the_median_of_aligned_frames_by_blocks_of_rows(rows, monkeypatch):
    """Against all at once, by hand: translations, an affine motion and a homography, and rows cut anywhere."""
    from torchalign.cube import reference as _reference
    from torchalign.cube.pixels import Pixels

    series = make_series(4, 40, bands=1, dtype="float32", nodata=None)
    lazy = rows == 7  # and frame by frame
    given = series.cube.chunk(time=3) if lazy else series.cube
    cube = Cube.of(given, dict.fromkeys(("time", "band", "y", "x")))
    warp = torch.eye(3).repeat(4, 1, 1)
    warp[0, :2, 2] = torch.tensor([2.3, -4.6])
    warp[1, :2, :2] = torch.tensor([[0.98, 0.2], [-0.2, 1.03]])
    warp[2, 2, :2] = 1e-3
    reader = _reference.FrameReader(cube, Pixels.of(cube), None, torch.device("cpu"))
    found = _reference.Found(warp, torch.tensor([True, True, True, False]))
    monkeypatch.setattr(_reference, "_REFERENCE_BYTES", rows * 4 * 40 * 4)
    monkeypatch.setattr(_reference, "_READ_BYTES", 11 * 4 * 40 * 4)
    for name in ("_LOAD_BYTES", "_DECODE_BYTES", "_SORT_BYTES"):
        monkeypatch.setattr(_reference, name, 1 if lazy else 2**20)
    made = _reference.over_time("median", reader, found)
    frames = torch.from_numpy(series.cube.values[:3])
    whole = ta.warp(frames, warp[:3], interpolation="bicubic", fill_value=float("nan"))
    expected = np.ma.median(np.ma.masked_invalid(whole.numpy()), 0).filled(np.nan)
    np.testing.assert_allclose(made, expected, atol=2e-6)


def test_the_clearest_frame():
    series = make_series(5, 48, bands=1, dtype="float32", max_shift=0.5, noise=0.0)
    mask = series.clear.copy(data=np.ones((5, 48, 48), bool))
    mask[:, :24] = False
    mask[3] = True
    _, report = align(series.cube, "clearest", mask=mask)
    assert report.attrs["reference"] == "clearest (2017-01-20T10:30)"
    assert shifts(report)[3].tolist() == [0, 0]
    # clouds that nobody told of
    clouded = series.cube.copy(deep=True)
    for frame, (row, column) in {0: (2, 2), 1: (2, 26), 2: (26, 2), 4: (26, 26)}.items():
        clouded[frame, :, row : row + 20, column : column + 20] = 0.9
    _, report = align(clouded, "clearest")
    assert report.attrs["reference"].startswith("clearest (2017-01-20")


def test_a_frame_of_another_cube():
    series = make_series(3, 64)
    aligned, report = align(series.cube, series.reference)
    np.testing.assert_allclose(shifts(report), series.shift, atol=0.05)
    _, report = align(series.cube.isel(time=[1, 2]), aligned.isel(time=0))
    np.testing.assert_allclose(shifts(report), series.shift[1:], atol=0.08)


# --- verify, and the summary ---


def test_what_is_left_is_measured_again():
    series = make_series(6, 64, dtype="float32", nodata=None)
    series.cube[4] = np.nan
    _, report = align(series.cube, series.reference)
    left = np.hypot(report.residual_x, report.residual_y)
    assert np.isnan(left[4])
    assert np.nanmax(left) < 0.1
    np.testing.assert_allclose(report.residual_y_metres, -10 * report.residual_y, rtol=1e-6)
    _, plain = align(series.cube, series.reference, verify=False)
    assert not {"residual_x", "residual_y"} & set(plain)
    xr.testing.assert_identical(plain.warp, report.warp)


def test_the_residual_tells_of_a_wrong_warp():
    """An aligner that is half a pixel off, whatever it claims: the score says nothing, the residual does."""
    series = make_series(4, 96, bands=1, dtype="float32", nodata=None)
    truth = torch.from_numpy(series.shift)
    _, report = align(
        series.cube, series.reference, Fixed(translation_warp(truth + torch.tensor([0.5, -0.25])))
    )
    np.testing.assert_allclose(report.residual_x, -0.5, atol=0.04)
    np.testing.assert_allclose(report.residual_y, 0.25, atol=0.04)
    # a pattern that does not move, on frames and reference, masked on the frames: its mask moves with the frame
    pattern = make_series(1, 96, bands=1, dtype="float32", nodata=None, seed=9).cube.values[0] * 4
    mask = np.ones((4, 96, 96), bool)
    mask[:, 20:76, 20:76] = False
    spoilt = series.cube.copy(data=np.where(mask[:, None], series.cube, pattern))
    reference = series.reference.copy(data=np.where(mask[0], series.reference, pattern))
    _, report = align(spoilt, reference, Fixed(translation_warp(truth)), mask=mask)
    assert np.abs(report.residual_x).max() < 0.15  # half of the frame is left; other patterns: 0.09 to 0.13
    _, report = align(spoilt, reference, Fixed(translation_warp(truth)))
    assert np.nanmax(np.abs(report.residual_x)) > 0.5


def test_the_residual_is_not_measured_on_repeated_borders():
    """Most of a frame that moves far is its border, repeated: no ground, whatever the reference shows there."""
    series = make_series(2, 96, bands=1, dtype="float32", nodata=None)
    far = torch.tensor([[60.0, 0.0], [-60.0, 0.0]])
    repeated = ta.warp(torch.from_numpy(series.cube.values), translation_warp(far)).numpy()
    reference = repeated.copy()
    for number, border in enumerate((slice(0, 60), slice(36, 96))):  # a pixel further down
        reference[number][..., border] = np.roll(repeated[number][..., border], 1, axis=-2)
    _, report = align(series.cube, series.cube.copy(data=reference), Fixed(translation_warp(far)))
    left = np.hypot(report.residual_x, report.residual_y)
    assert (np.isnan(left) | (left < 0.1)).all()


def test_the_summary_in_numbers_and_words():
    series = make_series(10, 64, bands=1, dtype="float32", nodata=None)
    found = Fixed(
        translation_warp(torch.tensor([[0.3 * number, 0.4 * number] for number in range(10)])), flagged=2
    )
    _, report = align(series.cube, series.cube[0], found)
    summary = ta.summarize(report)
    assert (summary.frames, summary.counts) == (10, {"OK": 8, "NO_TEXTURE": 2})
    assert summary.shift_median == pytest.approx(0.5 * 3.5)
    assert summary.shift_p95 == pytest.approx(0.5 * np.percentile(np.arange(8), 95))
    assert summary.shift_median_metres == pytest.approx(5 * 3.5, rel=1e-5)
    radial = np.hypot(report.residual_x, report.residual_y).values[:8]
    assert np.isfinite(radial).any()
    assert report.residual_x[8:].isnull().all()  # there is nothing to be measured of what was not aligned
    assert summary.ce90 == pytest.approx(np.nanpercentile(radial, 90))
    assert summary.ce90_metres == pytest.approx(10 * summary.ce90, rel=1e-5)
    for name, value in summary.attrs().items():
        assert report.attrs[name] == value
    lines = str(summary).splitlines()
    assert lines[0] == "8 of 10 frames aligned (NO_TEXTURE 2)"
    assert lines[1] == "shift    median 1.750 px = 17.5 m"
    assert lines[4].split()[:2] == ["CE90", f"{summary.ce90:.3f}"]
    _, plain = align(
        series.cube.drop_vars(["x", "y"]), series.cube[0].drop_vars(["x", "y"]), found, verify=False
    )
    assert "m" not in str(ta.summarize(plain)).replace("frames", "").replace("median", "").split()
    assert "ce90" not in plain.attrs


# --- one solution for many cubes ---


@pytest.fixture(scope="module")
def two_resolutions():
    """The same ground at 10 m and, averaged 2 × 2 as a sensor would, at 20 m."""
    fine = make_series(6, 160, bands=1, dtype="float32", noise=0.003, max_shift=3.0, nodata=None)
    coarse = [array.coarsen(y=2, x=2).mean() for array in (fine.cube, fine.reference)]
    return fine, *coarse


def test_a_10_m_solution_on_20_m_bands_equals_the_native_one(two_resolutions):
    fine, coarse, coarse_reference = two_resolutions
    _, report = align(fine.cube, fine.reference, verify=False)
    _, native = align(coarse, coarse_reference, verify=False)
    grids = [
        find_georeference(Cube.of(array, dict.fromkeys(("time", "band", "y", "x"))))
        for array in (fine.cube, coarse)
    ]
    carried = regrid_warp(torch.from_numpy(report.warp.values), *grids)[:, :2, 2].numpy()
    assert np.abs(carried - shifts(native)).max() < 0.02
    assert np.abs(carried - fine.shift / 2).max() < 0.02
    applied = ta.apply(coarse, report)
    expected = ta.warp(torch.from_numpy(coarse.values), translation_warp(torch.from_numpy(carried)))
    np.testing.assert_allclose(applied, expected, atol=1e-6)
    # and as an image: as near to the reference as what was found at 20 m
    own = ta.apply(coarse, native)
    inner = {"y": slice(4, -4), "x": slice(4, -4)}
    off = [np.abs(array - own).isel(inner).mean() for array in (applied, coarse)]
    assert off[0] < 0.05 * off[1]


@pytest.mark.parametrize("homography", [False, True])
def test_grids_of_any_size_origin_and_direction(homography):
    """A point on the map goes to the same place, whichever grid the warp is written on."""
    source = Georeference((10.0, 0.0, 499_980.0, 0.0, -10.0, 5_000_040.0), (120, 100), UTM)
    warp = torch.tensor([[1.01, 0.02, 1.7], [-0.03, 0.99, -2.2]], dtype=torch.float64)
    if homography:
        warp = torch.cat((warp, torch.tensor([[1e-4, -2e-4, 1.0]])))
    points = torch.tensor([[3.0, 5.0], [70.25, 11.5], [99.0, 110.0]], dtype=torch.float64)
    transforms = [
        (20.0, 0, 499_980.0, 0, -20.0, 5_000_040.0),
        (60.0, 0, 499_020.0, 0, -60.0, 5_000_940.0),
        (2.5, 0, 500_003.7, 0, 2.5, 4_999_001.3),  # south-up
        (-10.0, 0, 501_000.0, 0, -5.0, 5_000_000.0),  # mirrored
    ]
    for transform in transforms:
        target = Georeference(transform, (50, 40), UTM)

        def on_map(pixels, grid):
            return (pixels + 0.5).numpy() @ grid.linear.T + grid.corner

        there = np.linalg.solve(target.linear, (on_map(points, source) - target.corner).T).T - 0.5
        moved = transform_points(regrid_warp(warp, source, target), torch.from_numpy(there))
        expected = on_map(transform_points(warp, points), source)
        np.testing.assert_allclose(on_map(moved, target), expected, atol=1e-6)
    identity = torch.eye(3)[: 3 if homography else 2]
    assert torch.equal(regrid_warp(identity, source, target), identity)
    assert regrid_warp(warp, source, source) is warp


def test_grids_that_cannot_be_related_raise(two_resolutions):
    fine, coarse, _ = two_resolutions
    _, report = align(fine.cube, fine.reference, verify=False)
    other = coarse.assign_coords(
        spatial_ref=((), 0, {"crs_wkt": UTM.replace("33", "34").replace('",15]', '",21]')})
    )
    with pytest.raises(ValueError, match=r"^grid: expected one CRS, got .*rio\.reproject"):
        ta.apply(other, report)
    with pytest.raises(ValueError, match=r"^estimate: expected grids that are known, got \(160, 160\)"):
        ta.apply(coarse.drop_vars(["x", "y"]), report)
    with pytest.raises(ValueError, match="grids with the same axes"):
        regrid_warp(
            torch.eye(2, 3),
            Georeference((1, 0, 0, 0, -1, 0), (9, 9)),
            Georeference((1, 0.1, 0, -0.1, -1, 0), (9, 9)),
        )
    # without coordinates, but of the same size: the same pixels
    plain = fine.cube.drop_vars(["x", "y"])
    xr.testing.assert_equal(ta.apply(plain, report), ta.apply(fine.cube, report).drop_vars(["x", "y"]))


def test_other_bands_and_subsets_of_frames_are_matched_by_date(two_resolutions):
    fine, *_ = two_resolutions
    aligned, report = align(fine.cube, fine.reference, verify=False)
    order = [4, 0, 2]
    applied = ta.apply(fine.cube.isel(time=order), report)
    np.testing.assert_array_equal(applied, aligned.isel(time=order))
    renamed = fine.cube.rename(time="t", band="bands")
    np.testing.assert_array_equal(ta.apply(renamed, report), aligned)
    later = fine.cube.isel(time=[0]).assign_coords(time=[np.datetime64("2031-01-01", "ns")])
    with pytest.raises(
        ValueError, match=r"^estimate: expected every frame of the cube among .*got none of 2031-01-01"
    ):
        ta.apply(later, report)
    again = report.isel(time=[0, 1, 1, 2])
    np.testing.assert_array_equal(ta.apply(fine.cube[[2, 0]], again), aligned[[2, 0]])
    with pytest.raises(ValueError, match="got several of 2017-01-10T10:30; select frames"):
        ta.apply(fine.cube[:2], again)
    numbered = report.drop_vars("time")
    np.testing.assert_array_equal(ta.apply(fine.cube, numbered), aligned)
    with pytest.raises(ValueError, match=r"^estimate: expected one warp for each frame, got 6 for 3 frames"):
        ta.apply(fine.cube.isel(time=order), numbered)


def test_dates_without_their_hour_are_matched_by_the_day(two_resolutions):
    """As names of files have them, in both directions; where a day has two frames, by the second."""
    fine, *_ = two_resolutions
    aligned, report = align(fine.cube, fine.reference, verify=False)

    def is_found(order, own, other=fine.cube.time):
        applied = ta.apply(
            fine.cube.isel(time=order).assign_coords(time=own), report.assign_coords(time=other)
        )
        np.testing.assert_array_equal(applied, aligned.isel(time=order))

    order, times = [4, 0, 2], fine.cube.time.values
    days = times.astype("datetime64[D]").astype("datetime64[ns]")
    is_found(order, days[order])
    is_found(order, times[order], days)
    is_found(order, times[order] + np.array([10, 0, -3], "timedelta64[s]").astype("timedelta64[ns]"))
    twice = days.copy()
    twice[:3] = days[0] + np.array([10 * 3600, 11 * 3600, 11 * 3600 + 7], "timedelta64[s]")
    is_found([1, 2, 0, 5], twice[[1, 2, 0, 5]], twice + np.timedelta64(24, "ms"))
    clear = fine.clear.assign_coords(time=days)  # as files of masks have them
    for given in (clear, clear.assign_coords(time=times)):
        masked, _ = align(fine.cube, fine.reference, verify=False, mask=given)
        np.testing.assert_array_equal(masked, align(fine.cube, fine.reference, mask=clear.values)[0])
    with pytest.raises(ValueError, match=r"^mask: expected the cube's 'time'"):
        align(fine.cube, fine.reference, mask=clear.assign_coords(time=days[::-1]))
    apart = days[1:3] - np.timedelta64(11, "h"), days + np.timedelta64(10, "m")  # days of another time zone
    for own, other in (
        (days[:1], twice), (twice[:2] + np.timedelta64(9, "s"), twice), (twice[:2], days), apart,
    ):  # fmt: skip
        frames = fine.cube.isel(time=slice(len(own))).assign_coords(time=own)
        with pytest.raises(ValueError, match=r"got none of .*give both the same labels with \.assign_coords"):
            ta.apply(frames, report.assign_coords(time=other))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "uint64", "bool", "float32"])
def test_classes_stay_classes(dtype):
    values = np.random.default_rng(3).choice([0, 1, 77, 200], (3, 20, 24))
    if dtype == "uint64":
        values = values.astype(dtype) * 2**55 + 1  # beyond what any float holds
    cube = xr.DataArray(values.astype(dtype), dims=("time", "y", "x"), attrs={"_FillValue": 77})
    warp = translation_warp(torch.tensor([[1.4, -0.6], [0.0, 0.0], [-2.5, 3.2]]))
    applied = ta.apply(cube, warp, interpolation="nearest")
    assert applied.dtype == cube.dtype
    # output pixel (i, j) shows source pixel (i - dy, j - dx), rounded
    expected = cube.values.copy()
    for frame, (dx, dy) in enumerate([(1.4, -0.6), (0, 0), (-2.5, 3.2)]):
        rows = np.clip(np.floor(np.arange(20) - dy + 0.5).astype(int), 0, 19)
        columns = np.clip(np.floor(np.arange(24) - dx + 0.5).astype(int), 0, 23)
        expected[frame] = cube.values[frame][np.ix_(rows, columns)]
    np.testing.assert_array_equal(applied, expected)
    filled = ta.apply(cube, warp, interpolation="nearest", fill_value=1)
    assert (filled.values[0, :, 0] == 1).all()
    assert set(np.unique(filled)) <= set(np.unique(cube))


def test_bool_is_not_interpolated():
    cube = xr.DataArray(np.arange(64).reshape(1, 8, 8) % 3 == 0, dims=("time", "y", "x"))
    warp = translation_warp(torch.tensor([[1.0, 0.0]]))
    np.testing.assert_array_equal(ta.apply(cube, warp)[0, :, 1:], cube[0, :, :-1])  # nearest, unasked
    with pytest.raises(ValueError, match=r'^datacube: .*interpolation="nearest"'):
        ta.apply(cube, warp, interpolation="bilinear")


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
def test_nodata_is_never_blended_and_does_not_grow_beyond_the_kernel(interpolation, dtype):
    nodata = {"uint16": 0, "int16": -9999, "float32": -9999.0}[dtype]
    random = np.random.default_rng(1)
    values = random.integers(1000, 1100, (2, 40, 40)).astype(dtype)
    holes = np.zeros((2, 40, 40), bool)
    holes[:, 12:20, 8:25] = True
    values[holes] = nodata
    cube = xr.DataArray(values, dims=("time", "y", "x"), attrs={"_FillValue": np.dtype(dtype).type(nodata)})
    shift = torch.tensor([[0.37, -0.71], [2.5, 1.25]])
    applied = ta.apply(cube, translation_warp(shift), interpolation=interpolation).values
    is_nodata = applied == nodata
    low, high = (950, 1150) if interpolation == "bicubic" else (1000, 1100)
    assert ((applied[~is_nodata] >= low) & (applied[~is_nodata] < high)).all()  # a blend would lie between
    for frame, (dx, dy) in enumerate(shift.tolist()):
        rows, columns = np.nonzero(is_nodata[frame])
        assert rows.min() >= 12 + dy - 1
        assert rows.max() <= 19 + dy + 1
        assert columns.min() >= 8 + dx - 1
        assert columns.max() <= 24 + dx + 1
        assert abs(is_nodata[frame].sum() - 8 * 17) <= 8 + 17


def test_frames_that_were_not_aligned_come_back_bit_for_bit():
    series = make_series(3, 24, bands=1)
    _, report = align(series.cube, series.cube[0], Fixed(translation_warp(torch.ones(3, 2) * 1.5), flagged=1))
    for options in ({}, {"fill_value": 7}, {"mask": np.zeros((3, 24, 24), bool), "fill_value": 7}):
        applied = ta.apply(series.cube, report, **options)
        np.testing.assert_array_equal(applied[2], series.cube[2])
        assert not (applied[0] == series.cube[0]).all()


@pytest.mark.parametrize("kind", ["Estimate", "tensor", "array"])
def test_plain_estimates_are_in_pixels_of_the_grid_they_come_with(kind, two_resolutions):
    fine, coarse, _ = two_resolutions
    cube, reference = torch.from_numpy(fine.cube.values), torch.from_numpy(fine.reference.values)
    estimate = ta.PCC().estimate(cube, reference)
    given = {"Estimate": estimate, "tensor": estimate.warp, "array": estimate.warp.numpy()}[kind]
    _, report = align(fine.cube, fine.reference, verify=False)
    expected = ta.apply(coarse, report)
    np.testing.assert_allclose(ta.apply(coarse, given, grid=fine.cube), expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"^grid: expected None with a report"):
        ta.apply(coarse, report, grid=fine.cube)
    with pytest.raises(ValueError, match=r"^estimate: expected one warp for each frame, got 6 warps for 2"):
        ta.apply(coarse[:2], given)
    with pytest.raises(TypeError, match=r"^estimate: expected floating warps"):
        ta.apply(coarse, estimate.warp[0])
    with pytest.raises(TypeError, match=r"^estimate: expected a report"):
        ta.apply(coarse, None)


# --- only the georeference ---


@pytest.mark.parametrize("down", [-1, 1])
def test_the_georeference_of_each_frame_is_corrected(down):
    series = make_series(4, 64)
    cube = series.cube.assign_coords(y=5_000_000 + down * 10.0 * (np.arange(64) + 0.5))
    reference = series.reference.assign_coords(y=cube.y)
    _, report = align(cube, reference)
    corrected = ta.apply(cube, report, mode="shift-coords")
    np.testing.assert_array_equal(corrected.values, cube.values)
    assert corrected.data is cube.data or np.shares_memory(corrected.values, cube.values)
    for text, (dx, dy) in zip(corrected.geotransform.values, shifts(report), strict=True):
        numbers = [float(number) for number in text.split()]
        assert numbers[1:3] == [10, 0]
        assert numbers[4:] == [0, 10 * down]
        np.testing.assert_allclose(numbers[0], 499_980 + 10 * dx, atol=1e-4)
        np.testing.assert_allclose(numbers[3], 5_000_000 + down * 10 * dy, atol=1e-4)


def test_the_corrected_georeference_says_what_resampling_does():
    """Affine, too: where a pixel's centre lies on the map is where the warp takes it."""
    cube = make_series(2, 32).cube
    warp = torch.tensor(
        [[[1.01, 0.02, 1.5], [-0.03, 0.98, -0.75]], [[1.0, 0, 0], [0, 1.0, 0]]], dtype=torch.float64
    )
    texts = ta.apply(cube, warp, mode="shift-coords").geotransform.values
    corrected = Georeference.from_gdal(texts[0], (32, 32))
    points = torch.tensor([[0.0, 0.0], [31.0, 4.0], [7.5, 20.25]], dtype=torch.float64)
    moved = transform_points(warp[0], points).numpy()
    expected = np.stack([499_980 + 10 * (moved[:, 0] + 0.5), 5_000_040 - 10 * (moved[:, 1] + 0.5)], -1)
    found = (points.numpy() + 0.5) @ corrected.linear.T + corrected.corner
    np.testing.assert_allclose(found, expected, atol=1e-6)
    # a frame that was not moved keeps its numbers to the last bit
    assert texts[1] == find_georeference(Cube.of(cube, dict.fromkeys(("time", "band", "y", "x")))).to_gdal()


def test_what_a_georeference_cannot_express_raises():
    cube = make_series(1, 16).cube
    with pytest.raises(ValueError, match=r"^datacube: expected a georeference to correct"):
        ta.apply(cube.drop_vars(["x", "y"]), torch.eye(2, 3)[None], mode="shift-coords")
    homography = torch.eye(3)[None].clone()
    ta.apply(cube, homography, mode="shift-coords")
    homography[0, 2, 0] = 1e-3
    with pytest.raises(ValueError, match=r"^estimate: .*homographies"):
        ta.apply(cube, homography, mode="shift-coords")
    with pytest.raises(ValueError, match=r"^mode: expected one of"):
        ta.apply(cube, homography, mode="guess")


# --- homographies, and an earlier solution to start from ---


@pytest.mark.parametrize("lazy", [False, True])
def test_homographies_go_everywhere(lazy, tmp_path):
    pytest.importorskip("dask") if lazy else None
    series = make_series(4, 32, bands=1, dtype="float32", nodata=None)
    warp = torch.eye(3).repeat(4, 1, 1)
    warp[:, :2, 2], warp[:, 2, 0] = 1.25, 1e-3
    aligner = Fixed(warp, flagged=1)
    aligner.motion = "homography"
    cube = series.cube.chunk({"time": 4}) if lazy else series.cube
    aligned, report = align(cube, series.cube[0], aligner)
    report = report.compute()
    assert report.warp.shape == (4, 3, 3)
    centre = torch.tensor([[15.5, 15.5]])
    moved = (transform_points(warp, centre) - centre)[:, 0]
    np.testing.assert_allclose(shifts(report)[:3], moved[:3], rtol=1e-5)
    np.testing.assert_array_equal(report.warp[3], np.eye(3))
    np.testing.assert_allclose(ta.apply(series.cube, report), aligned, atol=1e-6)
    for suffix in ("nc", "csv", "json"):
        again = ta.load_report(ta.save_report(report, tmp_path / f"report.{suffix}"))
        np.testing.assert_array_equal(again.warp, report.warp)


def test_homographies_of_a_lazy_cube_must_be_announced():
    pytest.importorskip("dask")
    series = make_series(2, 32, bands=1, dtype="float32", nodata=None)
    warp = torch.eye(3).repeat(2, 1, 1)
    _, report = align(series.cube.chunk({"time": 2}), series.cube[0], Fixed(warp))
    assert report.warp.compute().shape == (2, 2, 3)  # the third row says nothing, and may go
    warp[:, 2, 0] = 1e-3
    _, report = align(series.cube.chunk({"time": 2}), series.cube[0], Fixed(warp))
    with pytest.raises(ValueError, match=r'^aligner: .*motion = "homography"'):
        report.compute()


def test_an_earlier_solution_to_start_from(two_resolutions, tmp_path):
    fine, coarse, coarse_reference = two_resolutions
    _, report = align(coarse, coarse_reference, verify=False)
    path = ta.save_report(report, tmp_path / "report.json")
    expected = 2 * shifts(report)
    for init in (report, path, str(path)):
        seen = Fixed(translation_warp(torch.zeros(6, 2)))
        align(fine.cube, fine.reference, seen, init=init, verify=False)
        np.testing.assert_allclose(seen.inits[0][:, :2, 2], expected, rtol=1e-6)
    # farther than PCC looks by itself: 3 px at most, from 20 m pixels
    near = ta.PCC(max_translation=5.0)
    _, found = align(fine.cube, fine.reference, near, init=report, verify=False)
    np.testing.assert_allclose(shifts(found), fine.shift, atol=0.05)
    with pytest.raises(TypeError, match=r"^init: expected floating warps"):
        align(fine.cube, fine.reference, init=torch.eye(2, 3))


# --- the report travels ---


@pytest.mark.parametrize("suffix", ["nc", "csv", "json"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "uint16"])
def test_reports_written_and_read_give_the_same_bits(suffix, dtype, tmp_path):
    pytest.importorskip("h5netcdf") if suffix == "nc" else None
    nodata = 0 if dtype == "uint16" else None
    series = make_series(5, 64, dtype=dtype, nodata=nodata)
    series.cube[3] = series.cube.dtype.type(0)
    aligned, report = align(series.cube, series.reference)
    path = ta.save_report(report, tmp_path / f"report.{suffix}")
    again = ta.load_report(path)
    assert set(again) == set(report)
    for name in report:
        np.testing.assert_array_equal(again[name], report[name])
        assert again[name].dtype == report[name].dtype
        assert again[name].attrs.get("units") == report[name].attrs.get("units")
    np.testing.assert_array_equal(again.time, series.cube.time)
    assert again.status.values[3] == Status.NO_TEXTURE
    assert np.isinf(again.sigma[3])
    assert (
        report_georeference(again).transform
        == report_georeference(report).transform
        == (10, 0, 499_980, 0, -10, 5_000_040)
    )
    assert again.attrs["status_counts"] == "OK: 4, NO_TEXTURE: 1"
    assert report_georeference(again).crs == report_georeference(report).crs == UTM
    if suffix != "csv":
        assert again.attrs["aligner"] == report.attrs["aligner"]
    for given in (again, path, str(path)):
        np.testing.assert_array_equal(ta.apply(series.cube, given), ta.apply(series.cube, report))
    if series.cube.dtype.kind == "f":
        np.testing.assert_array_equal(ta.apply(series.cube, again), aligned)


def test_json_is_json_and_csv_is_a_table(tmp_path):
    series = make_series(3, 48)
    series.cube[1] = 0
    _, report = align(series.cube, series.reference)
    text = ta.save_report(report, tmp_path / "report.json").read_text()

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    document = json.loads(text, parse_constant=refuse)
    assert document["frames"][1]["status"] == "NO_TEXTURE"
    assert document["frames"][0]["time"] == "2017-01-05T10:30:00.000000000"
    with ta.save_report(report, tmp_path / "report.csv").open(newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0][:4] == ["time", "status", "shift_x", "shift_y"]
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("suffix", ["nc", "csv", "json"])
def test_a_report_is_not_applied_to_another_crs(suffix, tmp_path):
    pytest.importorskip("h5netcdf") if suffix == "nc" else None
    series = make_series(3, 48)
    _, report = align(series.cube, series.reference)
    path = ta.save_report(report, tmp_path / f"report.{suffix}")
    other = UTM.replace("33N", "34N").replace('"central_meridian",15', '"central_meridian",21')
    other = other.replace("32633", "32634")
    elsewhere = series.cube.assign_coords(spatial_ref=((), 0, {"crs_wkt": other, "spatial_ref": other}))
    with pytest.raises(ValueError, match=r"^grid: expected one CRS"):
        ta.apply(elsewhere, path)


@pytest.mark.parametrize("suffix", ["nc", "csv", "json"])
def test_reports_of_no_frames(suffix, tmp_path):
    pytest.importorskip("h5netcdf") if suffix == "nc" else None
    series = make_series(3, 48)
    _, report = align(series.cube, series.reference)
    path = ta.save_report(report.isel(time=slice(0)), tmp_path / f"report.{suffix}")
    again = ta.load_report(path)
    assert again["warp"].shape == (0, 2, 3)
    assert ta.summarize(again).frames == 0
    assert ta.apply(series.cube[:0], path).shape == series.cube[:0].shape


TEXT = [
    ["007", "008", "009"],
    ["2020-01", "2020-02", "2020-03"],
    ["2020-01-01T00:00:00", "2020-01-02T00:00:00", "2020-01-03T00:00:00"],
    ["2020-02-30T00:00:00.000", "2020-02-31T00:00:00.000", "2020-03-01T00:00:00.000"],
    ["0", "1", "2"],
    ["7", "8", "9"],
]


@pytest.mark.parametrize("labels", TEXT)
@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_text_along_time_stays_text(suffix, labels, tmp_path):
    cube = make_series(3, 32).cube.assign_coords(time=labels)
    _, report = align(cube, cube[0].drop_vars("time"))
    path = ta.save_report(report, tmp_path / f"report.{suffix}")
    assert ta.load_report(path).time.values.tolist() == labels
    np.testing.assert_array_equal(ta.apply(cube, path), ta.apply(cube, report))


@pytest.mark.parametrize(
    "dtype", ["M8[s]", "M8[us]", "M8[ns]", "m8[s]", "float32", "uint64", "bool", "object"]
)
@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_labels_of_every_dtype_find_their_frames(suffix, dtype, tmp_path):
    labels = np.array([1, 0] if dtype == "bool" else [17, 3]).astype(dtype)
    labels = labels / np.float32(10) if dtype == "float32" else labels
    cube = make_series(2, 32).cube.drop_vars("time").assign_coords(time=labels)
    _, report = align(cube, cube[0].drop_vars("time"))
    path = ta.save_report(report, tmp_path / f"report.{suffix}")
    if dtype != "object":
        again = ta.load_report(path).time
        assert again.dtype == cube.time.dtype
        np.testing.assert_array_equal(again, cube.time)
    np.testing.assert_array_equal(ta.apply(cube[::-1], path), ta.apply(cube, report)[::-1])


@pytest.mark.parametrize("labels", [[3, 1, 2], ["a", "b,c", 'd"e'], None])
def test_labels_of_other_kinds_survive(labels, tmp_path):
    cube = make_series(3, 32).cube.drop_vars("time")
    cube = cube if labels is None else cube.assign_coords(time=labels)
    _, report = align(cube, cube[0].drop_vars("time", errors="ignore"))
    for suffix in ("csv", "json"):
        again = ta.load_report(ta.save_report(report, tmp_path / f"report.{suffix}"))
        assert ("time" in again.coords) == (labels is not None)
        if labels is not None:
            assert again.time.values.tolist() == labels


def test_plain_estimates_are_saved_too(tmp_path):
    series = make_series(3, 64, dtype="float32", nodata=None)
    cube, reference = torch.from_numpy(series.cube.values), torch.from_numpy(series.reference.values)
    estimate = ta.PCC().estimate(cube, reference)
    path = ta.save_report(estimate, tmp_path / "report.csv", like=series.cube)
    _, report = align(series.cube, series.reference, verify=False)
    xr.testing.assert_allclose(ta.load_report(path).drop_attrs(), report.drop_attrs(), rtol=1e-5)
    bare = ta.load_report(ta.save_report(estimate, tmp_path / "bare.json"))
    np.testing.assert_array_equal(bare.warp, estimate.warp)
    assert report_georeference(bare) is None
    with pytest.raises(ValueError, match=r"^estimate: expected fields \(T, …\)"):
        as_report(estimate.map(lambda field: field[None]))
    with pytest.raises(ValueError, match=r"^estimate: expected one warp for each frame"):
        as_report(estimate, series.cube[:2])


def test_bad_reports_raise_with_a_cure(tmp_path):
    series = make_series(2, 32)
    _, report = align(series.cube, series.reference)
    with pytest.raises(ValueError, match=r"^path: expected a name ending in"):
        ta.save_report(report, tmp_path / "report.pickle")
    with pytest.raises(TypeError, match=r"^report: expected an xarray.Dataset"):
        ta.save_report(series.cube, tmp_path / "report.nc")
    with pytest.raises(ValueError, match=r"^report: expected the variables warp, status"):
        ta.save_report(report.drop_vars("warp"), tmp_path / "report.nc")
    with pytest.raises(FileNotFoundError, match="not there"):
        ta.load_report(tmp_path / "gone.csv")
    (tmp_path / "broken.json").write_text('{"frames": 3}')
    (tmp_path / "broken.csv").write_text("a,b\n1,2\n")
    (tmp_path / "status.csv").write_text("time,status,warp_00\n0,FINE,1.0\n")
    (tmp_path / "broken.nc").write_bytes(b"CDF no more")
    for name in ("broken.json", "broken.csv", "broken.nc", "status.csv"):
        with pytest.raises(ValueError, match=r"^path: expected .*save_report wrote"):
            ta.load_report(tmp_path / name)
    with pytest.raises(
        ValueError, match=r"got page\.html; give the \.csv, \.json or \.nc that save_report wrote"
    ):
        ta.load_report(tmp_path / "page.html")
    path = ta.save_report(report, tmp_path / "report.csv")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        ta.save_report(report, path)
    ta.save_report(report, path, overwrite=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        *("broken.csv", "broken.json", "broken.nc", "report.csv", "status.csv")
    ]


def test_aligning_again_finds_nothing():
    series = make_series(4, 96, dtype="float32", nodata=None)
    aligned, _ = align(series.cube, series.reference)
    _, report = align(aligned, series.reference)
    assert np.abs(shifts(report)).max() < 0.05


def test_warp_there_and_back_is_the_identity_on_any_grid():
    warp = torch.tensor([[1.0, 0.01, 2.0], [0.02, 1.0, -3.0]], dtype=torch.float64)
    ten, sixty = (
        Georeference((10, 0, 0, 0, -10, 0), (60, 60)),
        Georeference((60, 0, 120, 0, -60, -60), (10, 10)),
    )
    there = regrid_warp(warp, ten, sixty)
    torch.testing.assert_close(regrid_warp(there, sixty, ten), warp)
    both = compose_warps(there, invert_warp(there))
    torch.testing.assert_close(both, torch.eye(2, 3, dtype=torch.float64))


# --- the whole of it ---


def test_sixty_geotiffs(tmp_path):
    """As fastcubo names them: a folder in, a folder and a report out, as a user would write it."""
    rasterio = pytest.importorskip("rasterio")
    stack = fractal_stack(
        60, size=(64, 64), bands=2, max_shift=2.0, noise=0.002, offset=0.02, gain=(0.9, 1.1)
    )
    days = np.datetime64("2016-06-08T06:46:32") + np.arange(60) * np.timedelta64(5, "D")
    template = "{time:%Y%m%dT%H%M%S}_{time:%Y%m%dT070007}_T39PVM.tif"
    made = make_series(1, 64).cube
    values = np.rint(stack.cube.numpy() * 10_000).clip(1).astype("u2")
    made = xr.DataArray(
        values,
        {"time": days.astype("M8[ns]"), **{name: made[name] for name in ("band", "y", "x", "spatial_ref")}},
        made.dims,
        attrs=made.attrs | {"scale_factor": 1e-4},
    )
    written = ta.write_stack(made, tmp_path / "in", template=template)
    assert written[0].name == "20160608T064632_20160608T070007_T39PVM.tif"
    reference = made[0].copy(data=np.rint(stack.reference.numpy() * 10_000).astype("u2"))

    cube = ta.open_stack(tmp_path / "in")
    aligned, report = align(cube, reference)
    ta.write_stack(aligned, tmp_path / "out")
    ta.save_report(report, tmp_path / "report.csv")

    truth = stack.shift.numpy()
    assert (report.status == 0).all()
    off = np.hypot(*(shifts(report) - truth).T)
    assert off.max() < 0.02
    np.testing.assert_allclose(report.shift_x_metres, 10 * shifts(report)[:, 0], rtol=1e-5)
    np.testing.assert_allclose(report.shift_y_metres, -10 * shifts(report)[:, 1], rtol=1e-5)
    for before in written:
        with rasterio.open(before) as one, rasterio.open(tmp_path / "out" / before.name) as other:
            for name in (
                "transform",
                "crs",
                "dtypes",
                "nodata",
                "descriptions",
                "scales",
                "offsets",
                "shape",
            ):
                assert getattr(one, name) == getattr(other, name), name
    assert len(list((tmp_path / "out").iterdir())) == 60


def test_a_table_has_one_row_a_frame_and_the_status_in_words():
    status = [ta.Status.OK, ta.Status.LOW_SCORE, ta.Status.TOO_FAR]
    estimate = Estimate(
        torch.eye(2, 3).repeat(3, 1, 1) + torch.arange(18.0).reshape(3, 2, 3),
        *torch.arange(9.0).reshape(3, 3),
        torch.eye(2).repeat(3, 1, 1),
        torch.tensor(status),
        torch.zeros(3).long(),
    )
    table = ta.to_table(as_report(estimate))
    assert table.index.tolist() == [0, 1, 2]
    assert table.status.tolist() == ["OK", "LOW_SCORE", "TOO_FAR"]
    assert table.loc[2, "score"] == 2
    for row in range(2):
        for column in range(3):
            expected = estimate.warp[:, row, column].numpy()
            np.testing.assert_array_equal(table[f"warp_{row}{column}"], expected)
    dated = as_report(estimate).assign_coords(
        time=np.array(["2020-01-01", "2021-01-01", "2022-01-01"], "M8[ns]")
    )
    assert ta.to_table(dated).loc["2021", "status"].tolist() == ["LOW_SCORE"]
    with pytest.raises(TypeError, match=r"^report: expected an xarray\.Dataset"):
        ta.to_table(estimate)


@pytest.mark.parametrize(
    ("package", "extra", "use"),
    [
        ("h5netcdf", "io", lambda path: ta.load_report(path / "report.nc")),
        ("zarr", "io", lambda path: ta.io.write_cube(make_series(4, 40).cube, path / "cube.zarr")),
        ("rasterio", "io", lambda path: ta.open_stack(path)),
        ("matplotlib", "plot", lambda path: style._figure_class.__wrapped__()),
        ("torchmetrics", "training", lambda path: ta.training.RegistrationError),
    ],
)
def test_what_is_missing_says_so_and_how_to_get_it(package, extra, use, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "torchalign.training.metric", raising=False)
    with pytest.raises(
        ImportError, match=rf'the package {package}, got no such package; pip install "torchalign\[{extra}\]"'
    ):
        use(tmp_path)
