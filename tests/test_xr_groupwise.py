"""Labelled series without a reference: ``reference="groupwise"``, growing archives, chains."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import xarray as xr
from scenes import fractal
from series import UTM, make_series

import torchalign as ta
from torchalign.cube.labels import Cube
from torchalign.cube.reference import Found
from torchalign.cube.series import find_sun


@pytest.fixture(scope="module")
def made():
    return make_series(12, 96, max_shift=1.5, seed=6)


def spread(report, shift):
    """(T,) distance from the truth, the common shift taken off."""
    error = np.stack([report.shift_x, report.shift_y], -1) - shift
    return np.linalg.norm(error - np.median(error, 0), axis=-1)


def test_a_labelled_series_without_a_reference(made):
    aligned, report = ta.align(made.cube, "groupwise")
    assert (report.status == 0).all()
    assert spread(report, made.shift).max() < 0.03
    assert aligned.dtype == made.cube.dtype
    assert aligned.attrs == made.cube.attrs
    assert report.attrs["reference"].startswith("groupwise")
    assert {"closure", "support", "sigma_season", "season_shift_x", "season_shift_y"} <= set(report)
    assert "residual_x" not in report
    assert (report.closure < 0.02).all()
    assert "accuracy" in report.closure.attrs["long_name"]
    assert ta.summarize(report).counts == {"OK": 12}
    expected = ta.Groupwise(ta.PCC())(torch.from_numpy(made.cube.values.astype(np.float32)))[1]
    np.testing.assert_allclose(report.warp, expected.warp, atol=1e-4)


def test_lazy_is_eager_and_every_chunk_is_read_twice(made):
    reads = []

    def read(block, block_info=None):
        reads.append(block_info[0]["chunk-location"][0])
        return block

    lazy = made.cube.chunk(time=5)
    counted = lazy.copy(data=lazy.data.map_blocks(read, dtype=lazy.dtype, meta=np.empty(0, lazy.dtype)))
    aligned, report = ta.align(counted, "groupwise")
    assert sorted(reads) == [0, 1, 2]  # once to place them
    eager, expected = ta.align(made.cube, "groupwise")
    xr.testing.assert_identical(report.drop_attrs(), expected.drop_attrs())
    np.testing.assert_array_equal(aligned.compute(), eager)
    assert sorted(reads) == [0, 0, 1, 1, 2, 2]  # and once to move them


def test_what_is_asked_for_is_done(made):
    method = ta.Groupwise(ta.PCC(interpolation="bicubic"), neighbours=2, links=1, season="none")
    _, report = ta.align(made.cube, "groupwise", method)
    assert "neighbours=2" in report.attrs["aligner"]
    assert spread(report, made.shift).max() < 0.03
    _, report = ta.align(made.cube.isel(time=slice(0, 5)), "groupwise", "ecc")
    assert spread(report, made.shift[:5]).max() < 0.05
    clear = made.cube.isel(band=0) > 0
    _, report = ta.align(made.cube, "groupwise", mask=clear)
    assert (report.status == 0).all()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"init": np.zeros((12, 2, 3))}, ValueError, "init"),
        ({"reference_mask": np.ones((96, 96), bool)}, ValueError, "reference_mask"),
        ({"sun": np.zeros((3, 2))}, ValueError, "sun"),
        ({"sun": np.zeros((12, 2), "U1")}, TypeError, "sun"),
        ({"aligner": "pcc", "reference": "previous", "sun": np.zeros((12, 2))}, ValueError, "sun"),
        ({"reference": "median", "sun": np.zeros((12, 2))}, ValueError, "groupwise"),
        ({"reference": "median", "aligner": ta.Groupwise(ta.PCC())}, ValueError, "groupwise"),
        ({"aligner": ta.ECC(motion="affine")}, ValueError, "translation"),
    ],
)
def test_what_has_no_meaning_is_refused(made, options, error, match):
    with pytest.raises(error, match=match):
        ta.align(made.cube, **({"reference": "groupwise"} | options))


def test_a_lazy_cube_wants_an_aligner_that_keeps_little(made):
    with pytest.raises(ValueError, match="keeps little"):
        ta.align(made.cube.chunk(time=4), "groupwise", "ecc")


# ---------------------------------------------------------------------------------------------------- the sun


def placed(y=-10.0, x=10.0, times=("2017-06-21T10:05", "2017-12-21T10:05")):
    """Near Ljubljana, where UTM 33N has its 500 km."""
    coords = {
        "time": np.array(times, "datetime64[ns]"),
        "y": 5_095_000 + y * (np.arange(8) + 0.5),
        "x": 461_000 + x * (np.arange(8) + 0.5),
    }
    cube = xr.DataArray(np.zeros((len(times), 8, 8), "f4"), coords=coords, dims=("time", "y", "x"))
    return cube.assign_coords(spatial_ref=xr.DataArray(0, attrs={"crs_wkt": UTM}))


def test_the_suns_place_is_that_of_date_and_map():
    found = find_sun(None, Cube.of(placed()))
    # pvlib, nrel_numpy, 46.007 N, 14.497 E
    np.testing.assert_allclose(found, [[64.49, 147.26], [19.44, 166.59]], atol=0.03)
    flipped = find_sun(None, Cube.of(placed(y=10.0)))
    np.testing.assert_allclose(flipped[:, 1], 180 - found[:, 1], atol=0.01)
    mirrored = find_sun(None, Cube.of(placed(x=-10.0)))
    np.testing.assert_allclose(mirrored[:, 1], 360 - found[:, 1], atol=0.01)


def test_a_date_is_half_past_ten():
    day = find_sun(None, Cube.of(placed(times=("2017-06-21", "2017-12-21"))))
    hour = find_sun(None, Cube.of(placed(times=("2017-06-21T09:32", "2017-12-21T09:32"))))
    np.testing.assert_allclose(day, hour, atol=0.1)


def test_where_nothing_tells_there_is_no_sun():
    cube = placed()
    assert find_sun(None, Cube.of(cube.drop_vars("spatial_ref"))) is None
    assert find_sun(None, Cube.of(cube.drop_vars("time"))) is None
    given = find_sun([[30.0, 90.0], [40.0, 100.0]], Cube.of(cube.drop_vars(["x", "y", "time"])))
    np.testing.assert_array_equal(given, [[30.0, 90.0], [40.0, 100.0]])


# ---------------------------------------------------------------------------------------------------- archives


def test_an_archive_grows_and_stays_as_it_is(made):
    old, new = made.cube.isel(time=slice(0, 9)), made.cube.isel(time=slice(9, 12))
    _, report = ta.align(old, "groupwise")
    aligned, longer = ta.extend(new, report, archive=old)
    assert longer.sizes["time"] == 12
    for name in report.data_vars:
        np.testing.assert_array_equal(longer[name][:9], report[name])
    np.testing.assert_array_equal(longer.time, made.cube.time)
    assert (longer.status == 0).all()
    assert spread(longer, made.shift).max() < 0.03
    assert (longer.sigma[9:] > 0).all()
    assert ta.summarize(longer).frames == 12
    expected = ta.apply(new, longer.isel(time=slice(9, 12)))
    np.testing.assert_array_equal(aligned, expected)
    # each new frame on its own
    _, one = ta.extend(new.isel(time=[1]), report, archive=old)
    np.testing.assert_allclose(one.warp[9], longer.warp[10], atol=1e-5)


def test_a_foreign_frame_does_not_enter_an_archive(made):
    old = made.cube.isel(time=slice(0, 9))
    _, report = ta.align(old, "groupwise")
    place = fractal((900, 900), bands=2, seed=40)[:, 400:496, 400:496].numpy()
    foreign = made.cube.isel(time=[9, 10]).copy(data=np.stack([place, 0 * place]).astype(np.float32) * 8000)
    aligned, longer = ta.extend(foreign.astype("uint16"), report, archive=old)
    assert longer.status[9:].values.tolist() == [ta.Status.NOT_CONNECTED, ta.Status.NO_TEXTURE]
    np.testing.assert_array_equal(aligned, foreign.astype("uint16"))


@pytest.mark.parametrize("lazy", [False, True])
def test_an_archive_of_variables_grows(made, lazy):
    """A Dataset in, a Dataset out: the same numbers, and classes are copied."""
    both = (
        made.cube.astype("float32")
        .to_dataset("band")
        .rename_vars(dict(zip(made.cube.band.values, ("red", "nir"), strict=False)))
    )
    both["SCL"] = xr.where(both.red > float(both.red.median()), 8, 4).astype("uint8")
    both = both.chunk({"time": 2}) if lazy else both
    old, new = both.isel(time=slice(0, 9)), both.isel(time=slice(9, 12))
    _, report = ta.align(old, "groupwise")
    aligned, longer = ta.extend(new, report, archive=old.drop_vars("SCL"))
    assert list(aligned) == list(new)
    assert set(np.unique(aligned.SCL)) == {4, 8}
    plain = both.drop_vars("SCL").to_dataarray("band").transpose("time", "band", "y", "x")
    expected, other = ta.extend(plain[9:], report, archive=plain[:9])
    np.testing.assert_allclose(longer.warp, other.warp, atol=1e-5)
    np.testing.assert_allclose(aligned.nir, expected.sel(band="nir"), rtol=1e-4)
    exact = ta.apply(new.SCL, longer.isel(time=slice(9, 12)))
    np.testing.assert_array_equal(aligned.SCL, exact)
    # one band decides, all move; of bands that are one array, too
    stack = both.to_dataarray("band").transpose("time", "band", "y", "x")
    _, report = ta.align(stack[:9], "groupwise", bands=["red"])
    moved, _ = ta.extend(stack[9:], report, archive=stack[:9], bands=["red"])
    assert moved.dims == stack.dims
    assert set(np.unique(moved.sel(band="SCL"))) == {4, 8}
    with pytest.raises(TypeError, match="a Dataset, as the new frames are"):
        ta.extend(new, report, archive=stack[:9])
    with pytest.raises(ValueError, match="archive: expected a cube with the bands"):
        ta.extend(new, report, archive=old.drop_vars("nir"))


def test_what_an_archive_does_not_fit_is_refused(made):
    old, new = made.cube.isel(time=slice(0, 6)), made.cube.isel(time=slice(6, 8))
    _, report = ta.align(old, "groupwise")
    with pytest.raises(ValueError, match="archive"):
        ta.extend(new, report, archive=made.cube)
    with pytest.raises(ValueError, match="datacube"):
        ta.extend(new.isel(y=slice(0, 50)), report, archive=old)
    # dates twice in a report would fit no cube
    cube = made.cube.isel(time=slice(4, 8))
    with pytest.raises(ValueError, match=r"^datacube: .*got 2017-01-25T10:30, .*drop_isel\(time=\[0, 1\]\)"):
        ta.extend(cube, report, archive=old)
    xr.testing.assert_identical(cube.drop_isel(time=[0, 1]), new)
    days = cube.assign_coords(time=cube.time.dt.floor("D"))
    with pytest.raises(ValueError, match=r"^datacube: .*got 2017-01-25, .*drop_isel\(time=\[0, 1\]\)"):
        ta.extend(days, report, archive=old)
    with pytest.raises(ValueError, match=r"^datacube: expected dates, as the report has, got none"):
        ta.extend(new.drop_vars("time"), report, archive=old)
    bent = report.copy(deep=True)
    bent.warp[0, 0, 0] = 1.1
    with pytest.raises(ValueError, match="shifts only"):
        ta.extend(new, bent, archive=old)


# ------------------------------------------------------------------------------------------ previous, iterative


def test_a_chain_follows_the_frames(made):
    cube = made.cube.copy()
    cube[4] = 0  # nodata: passed over
    aligned, report = ta.align(cube, "previous", "pcc")
    assert report.status[4] != 0
    rest = report.isel(time=[n for n in range(12) if n != 4])
    assert (rest.status == 0).all()
    assert report.warp[0].values.tolist() == [[1, 0, 0], [0, 1, 0]]
    truth = np.delete(made.shift, 4, 0)
    error = np.stack([rest.shift_x, rest.shift_y], -1) - (truth - truth[0])
    assert np.linalg.norm(error, axis=1).max() < 0.05
    assert (np.diff(rest.sigma.values) > -1e-9).all()
    np.testing.assert_array_equal(aligned[4], cube[4])
    lazy = ta.align(cube.chunk(time=5), "previous", "pcc")[1]
    np.testing.assert_allclose(lazy.warp, report.warp, atol=1e-5)
    assert ta.align(cube.isel(time=[]), "previous", "pcc")[1].sizes["time"] == 0


def test_iterative_is_dropped_where_pairs_say_that_it_wandered(made, monkeypatch):
    from torchalign.cube import series

    monkeypatch.setattr(series.PairPositions, "prefers", lambda self, first, second: True)
    _, kept = ta.align(made.cube, "iterative", "pcc", verify=False)
    assert kept.attrs["reference"].startswith("iterative (")
    monkeypatch.setattr(series.PairPositions, "prefers", lambda self, first, second: False)
    _, dropped = ta.align(made.cube, "iterative", "pcc", verify=False)
    assert dropped.attrs["reference"].startswith("median (")
    _, median = ta.align(made.cube, "median", "pcc", verify=False)
    np.testing.assert_array_equal(dropped.warp, median.warp)


def test_pairs_prefer_the_truth(made):
    from torchalign.cube.pixels import Pixels
    from torchalign.cube.reference import FrameReader
    from torchalign.cube.series import PairPositions

    cube = Cube.of(made.cube)
    evidence = PairPositions(FrameReader(cube, Pixels.of(cube), None, torch.device("cpu")), ta.PCC())

    def found(shift):
        warp = torch.eye(2, 3).repeat(12, 1, 1)
        warp[..., 2] = torch.as_tensor(shift)
        return Found(warp, torch.ones(12, dtype=torch.bool))

    off = np.array(made.shift) + 0.2 * np.random.default_rng(0).normal(size=(12, 2))
    assert evidence.prefers(found(off), found(made.shift))
    assert not evidence.prefers(found(made.shift), found(off))
    assert not evidence.prefers(found(off), found(off))
    assert not evidence.prefers(found(made.shift), found(made.shift))
    few = found(made.shift)
    assert not evidence.prefers(few._replace(valid=torch.arange(12) < 2), found(off))


# ---------------------------------------------------------------------------------------------------- pictures


@pytest.fixture(scope="module")
def told(made):
    """The report of the series, the sun given."""
    sun = np.stack([30 + 2.0 * np.arange(12), np.full(12, 160.0)], -1)
    return ta.align(made.cube, "groupwise", sun=sun)[1]


@pytest.mark.parametrize("name", ["pair_residuals", "network", "sun_shift", "closure"])
def test_pictures(told, name):
    figure = getattr(ta.plot, name)(told)
    ax = figure.axes[0]
    figure.savefig(io.BytesIO(), format="png")
    assert ax.get_title()
    if name == "pair_residuals":
        drawn = ax.images[0].get_array().filled(np.nan)
        assert drawn.shape == (12, 12)
        np.testing.assert_array_equal(drawn, drawn.T)
        assert np.isfinite(drawn).sum() == 2 * len(told.attrs["pair_moving"])
    elif name == "network":
        assert len(ax.collections[0].get_segments()) == len(told.attrs["pair_moving"])
    elif name == "sun_shift":
        found = np.sort(ax.lines[0].get_xdata())
        np.testing.assert_allclose(found, np.sort(1 / np.tan(np.deg2rad(told.sun_elevation))), rtol=1e-5)
    else:
        assert "accuracy" in ax.get_title()


@pytest.mark.parametrize(("step", "unit"), [(9, "days"), (90, "day of year"), (None, "frames")])
def test_the_network_tells_its_pairs_apart(told, step, unit):
    if step is None:
        report = told.assign_coords(time=range(12))
    else:
        report = told.assign_coords(
            time=np.datetime64("2021-01-05", "ns") + step * np.arange(12) * np.timedelta64(1, "D")
        )
    ax = ta.plot.network(report).axes[0]
    assert ax.get_ylabel().startswith(unit)
    lines = np.stack([path[[0, len(path) // 2, -1]] for path in ax.collections[0].get_segments()])
    moving, reference = (told.attrs[f"pair_{end}"] for end in ("moving", "reference"))
    apart = np.abs(np.subtract(moving, reference)) * (step or 1)
    if unit != "day of year":
        np.testing.assert_allclose(lines[:, 1, 1], apart, rtol=1e-9)
        np.testing.assert_allclose(np.abs(lines[:, 2, 0] - lines[:, 0, 0]), apart, rtol=1e-9)
        np.testing.assert_allclose(lines[:, [0, 2], 1], 0, atol=1e-9 * apart.max())


def test_the_network_of_no_frames(made):
    assert not ta.plot.network(ta.align(made.cube[:0], "groupwise")[1]).axes[0].collections[0].get_segments()


def test_pictures_refuse_other_reports(made, told):
    _, report = ta.align(made.cube, "first", "pcc")
    for draw in (ta.plot.network, ta.plot.pair_residuals, ta.plot.closure):
        with pytest.raises(ValueError, match="groupwise"):
            draw(report)
    with pytest.raises(ValueError, match="sun"):
        ta.plot.sun_shift(told.drop_vars("sun_elevation"))


def test_the_html_report_shows_the_pairs(told):
    text = ta.html.to_html(told)
    assert "pairs of frames" in text
    assert "against the sun" in text


def test_a_report_of_a_series_is_saved_and_read(told, tmp_path):
    for name in ("r.nc", "r.json", "r.csv"):
        ta.save_report(told, tmp_path / name)
        found = ta.load_report(tmp_path / name)
        np.testing.assert_allclose(found.closure, told.closure, rtol=1e-6)
