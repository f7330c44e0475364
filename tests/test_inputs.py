"""What people have, on small made files: every kind of docs/inputs.md gets in, is aligned, and comes out whole."""

from __future__ import annotations

import datetime
import functools
import json
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy.ndimage import gaussian_filter

import torchalign as ta
from torchalign.html import to_html

rasterio = pytest.importorskip("rasterio", reason='pip install "torchalign[io]"')
pytest.importorskip("dask", reason='pip install "torchalign[dask]"')
from rasterio.control import GroundControlPoint  # noqa: E402
from rasterio.crs import CRS  # noqa: E402
from rasterio.enums import ColorInterp  # noqa: E402
from rasterio.transform import Affine  # noqa: E402
from rasterio.warp import transform as move_points  # noqa: E402

SIZE = 64
OFFSETS = [(8, 8), (7, 10), (9, 7)]  # (row, column) of the windows; shifts are their differences
TRUTH = np.array([(column - 8, row - 8) for row, column in OFFSETS], float)
DAYS = ["2020-01-05", "2020-01-15", "2020-01-25"]
COMPACT = [day.replace("-", "") for day in DAYS]
UTM = "EPSG:32633"


def place(step=10.0, right=0.0, down=0.0):
    """North up, moved by metres from the corner that all begin at."""
    return Affine(step, 0.0, 500_000.0 + right, 0.0, -step, 5_000_000.0 - down)


TEN = place()


@functools.cache
def scene(seed=0):
    random = np.random.default_rng(seed)
    values = gaussian_filter(random.normal(size=(96, 96)), 1.5)
    return (values - values.min()) / np.ptp(values)


def frames(dtype="uint16", bands=1, low=400, high=3000, size=SIZE):
    """(T, C, H, W), the same scene at three places, each band with its own gain."""
    cut = np.stack([scene()[row : row + size, column : column + size] for row, column in OFFSETS])
    values = np.stack([low + (high - low) * cut * (1 - 0.1 * band) for band in range(bands)], 1)
    return values.astype(dtype)


def classes(codes=(4, 8), dtype="uint8"):
    """(T, H, W), which moves with the scene."""
    return np.where(frames("float64")[:, 0] > 1700, codes[1], codes[0]).astype(dtype)


@pytest.fixture(autouse=True)
def _plain_files():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        yield


def write(path, values, *, crs=UTM, transform=TEN, nodata=None, mask=None, alpha=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = values if values.ndim == 3 else values[None]
    names, table = options.pop("names", ()), options.pop("table", None)
    tags, gcps, interpretations = (options.pop(key, None) for key in ("tags", "gcps", "interpretations"))
    count = len(values) + (alpha is not None)
    profile = {"driver": "GTiff", "dtype": values.dtype, "count": count, "nodata": nodata}
    profile |= {
        "height": values.shape[1],
        "width": values.shape[2],
        "crs": crs,
        "transform": transform,
    } | options
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=options.pop("inside", True)),
        rasterio.open(path, "w", **profile) as file,
    ):
        if interpretations:
            file.colorinterp = interpretations
        elif alpha is not None:
            file.colorinterp = [*file.colorinterp[:-1], ColorInterp.alpha]
        if table:
            file.write_colormap(1, table)
        file.write(values if alpha is None else np.concatenate([values, alpha[None]]).astype(values.dtype))
        if mask is not None:
            file.write_mask(mask)
        for number, name in enumerate(names, 1):
            file.set_band_description(number, name)
        if tags:
            file.update_tags(**tags)
        if gcps:
            file.gcps = (gcps, CRS.from_string("EPSG:4326"))
    return path


def check_shifts(report, tolerance=0.1, truth=TRUTH):
    assert (report.status == 0).all()
    found = np.stack([report.shift_x, report.shift_y], 1)
    np.testing.assert_allclose(found, truth - truth[0], atol=tolerance)


def check_classes(aligned, before, share=0.97):
    """No class that was not there; and they moved with the scene."""
    assert set(np.unique(aligned)) <= set(np.unique(before))
    inner = np.s_[4:-4, 4:-4]
    assert (np.asarray(aligned)[1][inner] == np.asarray(before)[0][inner]).mean() > share


def check_same(aligned, cube):
    """All that belongs to it, but for the pixels."""
    assert aligned.dims == cube.dims
    assert aligned.dtype == cube.dtype
    assert aligned.attrs == cube.attrs
    for name in set(cube.coords) - {"usable"}:
        xr.testing.assert_identical(aligned[name].variable, cube[name].variable)
    assert aligned.values[0].tobytes() == cube.values[0].tobytes()  # the first frame is not resampled


def check_rows(folder, pattern="*.tif*"):
    """Of files that are warped some rows are what they are in the whole."""
    from torchalign.cube.rasters import StackOptions, read_stack

    options = StackOptions(pattern, None, None, None, "raise", True, False, "first", "bilinear", True)
    cube = read_stack(folder, options)
    whole = cube.compute()
    for rows in (slice(0, 5), slice(20, 40), slice(SIZE - 3, SIZE)):
        part = cube.isel(y=rows)  # read from the files
        xr.testing.assert_identical(part.compute(), whole.isel(y=rows))


def align(cube, **options):
    return ta.align(cube, "first", ta.PCC(), **options)


# --- arrays of other packages, as they come ---


def spatial_ref(name="spatial_ref"):
    wkt = CRS.from_string(UTM).to_wkt()
    attrs = {"crs_wkt": wkt, "spatial_ref": wkt, "GeoTransform": "500000.0 10.0 0.0 5000000.0 0.0 -10.0"}
    return {name: ((), 32633, attrs)}


def axes(step=10.0, size=SIZE):
    return {"y": 5_000_000 - step * (np.arange(size) + 0.5), "x": 500_000 + step * (np.arange(size) + 0.5)}


def times():
    return {"time": np.array(DAYS, "datetime64[ns]")}


def odc_dataset():
    """As odc.stac.load returns it: a variable a band, nodata in attrs, grid_mapping in encoding."""
    dims, coords = ("time", "y", "x"), times() | axes() | spatial_ref()
    values = frames(bands=3)
    variables = {name: (dims, values[:, number], {"nodata": 0, "units": "1"})
                 for number, name in enumerate(("red", "green", "nir"))}  # fmt: skip
    variables["SCL"] = (dims, classes(), {"nodata": 0})
    dataset = xr.Dataset(variables, coords)
    dataset.red[1, 30:34, 30:34] = 0
    for name in variables:
        dataset[name].encoding["grid_mapping"] = "spatial_ref"
    return dataset


def test_odc_stac():
    dataset = odc_dataset()
    aligned, report = align(dataset)
    check_shifts(report)
    assert list(aligned) == list(dataset)
    for name in dataset:
        check_same(aligned[name], dataset[name])
        assert aligned[name].encoding["grid_mapping"] == "spatial_ref"
    check_classes(aligned.SCL, dataset.SCL)
    assert (aligned.red == 0).sum() > 8  # nodata stays nodata, and of one variable only
    assert (aligned.green != 0).all()
    assert report.attrs["classes"] == "SCL"
    assert report.shift_x_metres[1] == pytest.approx(20, abs=1)
    alone = ta.apply(dataset[["SCL"]], report)  # nothing for an estimate to see, and none is made
    np.testing.assert_array_equal(alone.SCL, aligned.SCL)
    with pytest.raises(ValueError, match="a variable that is no classification"):
        align(dataset[["SCL"]])
    one, _ = align(dataset, bands=["nir"])
    np.testing.assert_allclose(one.red[1].astype(float), aligned.red[1].astype(float), atol=60)
    lazy, lazy_report = align(dataset.chunk({"time": 1}))
    assert lazy.SCL.chunks is not None
    check_shifts(lazy_report.compute())
    np.testing.assert_array_equal(lazy.SCL.compute(), aligned.SCL)


def test_odc_stac_as_dataarray():
    array = odc_dataset().to_dataarray("band").transpose("time", "band", "y", "x")
    array = array.assign_coords(nodata=("band", [0, 0, 0, 255]))
    array[1, 1, 10:12] = 0
    aligned, report = align(array)
    check_shifts(report)
    check_same(aligned, array)
    check_classes(aligned.sel(band="SCL"), array.sel(band="SCL"))


def test_stackstac():
    values = frames("float64", bands=2)
    values[1, :, 20:24, 20:24] = np.nan
    values = np.concatenate([values, classes(dtype="float64")[:, None]], 1)
    coords = times() | axes() | {"band": ["B04", "B08", "SCL"], "epsg": 32633, "proj:transform": "…"}
    coords |= {"title": ("band", ["red", "nir", "scene classification"]), "id": ("time", ["a", "b", "c"])}
    array = xr.DataArray(
        values, coords, ("time", "band", "y", "x"), "stackstac-0123", {"spec": "…", "crs": "epsg:32633"}
    )
    aligned, report = align(array)
    check_shifts(report)
    check_same(aligned, array)
    check_classes(aligned.sel(band="SCL"), array.sel(band="SCL"))
    assert report.attrs["grid_crs"].startswith("PROJCS")
    assert report.shift_y_metres[1] == pytest.approx(10, abs=1)


def test_cubo():
    coords = (
        times()
        | axes()
        | {"band": ["B04", "B08"], "cubo:distance_from_center": (("y", "x"), np.zeros((SIZE,) * 2))}
    )
    attrs = {"collection": "sentinel-2-l2a", "epsg": 32633, "resolution": 10, "edge_size": SIZE}
    array = xr.DataArray(frames(bands=2), coords, ("time", "band", "y", "x"), "sentinel-2-l2a", attrs)
    aligned, report = align(array)
    check_shifts(report)
    check_same(aligned, array)
    assert report.attrs["grid_crs"]


def geographic(step=0.0001, latitude=60.0):
    return {"lat": latitude - step * np.arange(SIZE), "lon": 10 + step * np.arange(SIZE)}


def test_xcube():
    """lat, lon, a bare coordinate crs, bounds, and a variable that is no frame."""
    dims, coords = ("time", "lat", "lon"), times() | geographic()
    coords["crs"] = (
        (),
        0,
        {"grid_mapping_name": "latitude_longitude", "crs_wkt": CRS.from_epsg(4326).to_wkt()},
    )
    variables = {
        "B04": (dims, frames("float32")[:, 0], {"units": "1"}),
        "B08": (dims, frames("float32")[:, 0]),
    }
    variables |= {"quality_flags": (dims, classes(), {"flag_masks": [4, 8], "flag_meanings": "land cloud"})}
    variables |= {"lat_bnds": (("lat", "bnds"), np.zeros((SIZE, 2)))}
    dataset = xr.Dataset(variables, coords)
    aligned, report = align(dataset)
    check_shifts(report)
    check_classes(aligned.quality_flags, dataset.quality_flags)
    xr.testing.assert_identical(aligned.lat_bnds, dataset.lat_bnds)
    assert report.attrs["grid_crs"].startswith("GEOGC")
    pyproj = pytest.importorskip("pyproj")
    middle = float(dataset.lat.mean())
    for role, ends in (("x", (10, middle, 10.0002, middle)), ("y", (10, middle, 10, middle + 0.0001))):
        _, _, metres = pyproj.Geod(ellps="WGS84").inv(*ends)
        assert abs(float(report[f"shift_{role}_metres"][1])) == pytest.approx(metres, rel=0.03)


def test_era5():
    """valid_time, latitude, longitude, floats that a file packs into integers."""
    coords = {"valid_time": np.array(DAYS, "datetime64[ns]"), "number": 0}
    coords |= {"latitude": 50 - 0.25 * np.arange(SIZE), "longitude": 0.25 * np.arange(SIZE)}
    array = xr.DataArray(frames("float32")[:, 0], coords, ("valid_time", "latitude", "longitude"), "t2m")
    array.encoding = {"dtype": "int16", "scale_factor": 0.1, "add_offset": 2000.0, "_FillValue": -32767}
    aligned, report = align(array)
    check_shifts(report)
    check_same(aligned, array)
    assert aligned.encoding == array.encoding
    assert "shift_x_metres" in report


@pytest.mark.parametrize("name", ["timestamp", "datetime"])
def test_other_names_of_time(name):
    array = xr.DataArray(frames()[:, 0], {name: times()["time"]}, (name, "y", "x"))
    aligned, report = align(array)
    check_shifts(report)
    assert aligned.dims == (name, "y", "x")
    assert report.status.dims == (name,)


def test_dates_of_python(tmp_path):
    """``groupby("time.date")`` leaves dates of Python, pandas some that have a time zone."""
    cubes = xr.DataArray(frames()[:, 0], {**times(), **axes()}, ("time", "y", "x"))
    count = cubes.sizes["time"]
    days = [datetime.date(2024, 1, 1 + number) for number in range(count)]
    zone = datetime.timezone(datetime.timedelta(hours=1))
    kinds = {
        "date": np.array(days, object),
        "zone": pd.date_range("2024-01-01", periods=count, tz="Europe/Berlin"),
        "aware": np.array([datetime.datetime(2024, 1, day, tzinfo=zone) for day in (1, 2, 3)], object),
        "period": pd.period_range("2024-01-01", periods=count, freq="D"),
    }
    if hasattr(xr, "coders"):  # xarray that reads dates beyond nanoseconds
        kinds["old"] = np.array([datetime.date(1500, 1, 1 + number) for number in range(count)], object)
    for name, labels in kinds.items():
        cube = cubes.assign_coords(time=labels)
        day, hours = "1500-01-02" if name == "old" else "2024-01-02", int(name in ("zone", "aware"))
        plain = np.array(day, "M8[us]") + (np.arange(count) - 1) * np.timedelta64(1, "D")
        stored = plain - np.timedelta64(hours, "h")  # in UTC
        for reference in (day, labels[1], datetime.date.fromisoformat(day), cube.time[1], stored[1]):
            aligned, report = ta.align(cube, reference, "pcc", verify=False)
            assert report.attrs["reference"] == day
        assert aligned.indexes["time"].equals(cube.indexes["time"])
        assert report.indexes["time"].equals(cube.indexes["time"])
        assert aligned.where(report.status == 0).sizes == aligned.sizes
        for suffix in ("nc", "json", "csv"):
            known = ta.load_report(ta.save_report(report, tmp_path / f"{name}.{suffix}"))
            assert np.array_equal(known.time.values, stored)
            assert ta.apply(cube, known).identical(aligned)
        assert ta.apply(cubes.assign_coords(time=stored), report).values.shape == aligned.shape
        past, known = ta.align(cube[:2], "groupwise")
        for report_of_past in (known, ta.load_report(ta.save_report(known, tmp_path / f"{name}_past.nc"))):
            longer = ta.extend(cube[2:], report_of_past, archive=past)[1]
            assert ta.apply(cube, longer).sizes == cube.sizes
        usable = xr.ones_like(cube, bool)
        for one, other in ((cube, stored), (cubes.assign_coords(time=stored), labels)):
            masked = ta.align(
                one,
                day if one is cube else "first",
                "pcc",
                mask=usable.assign_coords(time=other),
                verify=False,
            )
            assert masked[1].sizes == report.sizes
        paths = ta.write_stack(aligned, tmp_path / name)
        assert [path.stem for path in paths] == [str(label)[:10].replace("-", "") for label in plain]
        assert ta.io.write_cube(aligned, tmp_path / f"{name}_cube.zarr").exists()
        path = ta.io.write_cube(aligned, tmp_path / f"{name}_cube.nc")
        if name != "old":
            with xr.open_dataset(path) as written:
                assert np.array_equal(written.time.values, stored)
        assert day in to_html(report)


@pytest.mark.parametrize(
    ("first", "frequency", "start"), [("2020-02", "M", "2020-02-01"), ("1500", "Y", "1500-01-01")]
)
def test_a_period_is_written_as_its_start(first, frequency, start, tmp_path):
    cube = xr.DataArray(np.ones((2, 4, 4), "uint8"), dims=("time", "y", "x"))
    cube["time"] = pd.PeriodIndex([first, pd.NaT], freq=frequency)
    with xr.open_zarr(ta.io.write_cube(cube, tmp_path / "cube.zarr"), decode_times=False) as stored:
        assert start in stored.time.attrs["units"]
    assert ta.write_stack(cube[:1], tmp_path / "files")[0].stem == start.replace("-", "")


def test_dates_of_cftime(tmp_path):
    cftime = pytest.importorskip("cftime")
    cubes = xr.DataArray(frames()[:, 0], {**times(), **axes()}, ("time", "y", "x"))
    labels = [cftime.DatetimeNoLeap(2024, 1, 1 + number) for number in range(3)]
    cube = cubes.assign_coords(time=xr.CFTimeIndex(labels))
    for reference in (labels[1], cube.time[1], "2024-01-02"):
        assert ta.align(cube, reference, verify=False)[1].attrs["reference"] == str(labels[1])
    assert ta.write_stack(cube, tmp_path / "model")[0].name == "20240101.tif"


def test_eopatch():
    """Arrays (T, H, W, C) and a cloud mask (T, H, W, 1), 1 = cloud."""
    data, clm = np.moveaxis(frames("float32", bands=3), 1, -1), np.zeros((3, SIZE, SIZE, 1), "uint8")
    clm[1, :20, :20] = 1
    data[1, :20, :20] = 9000
    array = xr.DataArray(data, times(), ("time", "y", "x", "band"))
    clouds = xr.DataArray(clm[..., 0], times(), ("time", "y", "x"), "CLM")
    aligned, report = align(array, mask=clouds == 0)
    check_shifts(report)
    assert aligned.dims == array.dims
    moved = ta.apply(clouds, report)  # called CLM: copied
    assert set(np.unique(moved)) == {0, 1}


def test_netcdf_with_grid_mapping(tmp_path):
    pytest.importorskip("h5netcdf")
    dataset = odc_dataset()
    dataset.to_netcdf(tmp_path / "in.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "in.nc", engine="h5netcdf", decode_coords="all") as opened:
        aligned, report = align(opened)
        check_shifts(report)
        assert report.attrs["grid_crs"]
        ta.io.write_cube(aligned, tmp_path / "out.nc")
    with xr.open_dataset(tmp_path / "out.nc", engine="h5netcdf", decode_coords="all") as again:
        assert "spatial_ref" in again.coords
        assert {name: again[name].dtype for name in again} == {name: dataset[name].dtype for name in dataset}
        assert again.red.attrs["nodata"] == 0
        np.testing.assert_array_equal(again.SCL, aligned.SCL)


def test_zarr(tmp_path):
    pytest.importorskip("zarr")
    dataset = odc_dataset().assign(clear=(("time", "y", "x"), classes() == 4))
    ta.io.write_cube(dataset, tmp_path / "in.zarr")
    opened = xr.open_zarr(tmp_path / "in.zarr", mask_and_scale=False)
    aligned, report = align(opened)
    _, known = ta.io.write_cube(aligned, tmp_path / "out.zarr", report=report)
    check_shifts(known)
    again = xr.open_zarr(tmp_path / "out.zarr", mask_and_scale=False).load()
    assert again.clear.dtype == bool
    check_classes(again.SCL, dataset.SCL)
    eager, _ = align(dataset)
    np.testing.assert_array_equal(again.nir, eager.nir)


def test_frames_without_dates_or_place():
    array = xr.DataArray(frames("uint8", low=0, high=250)[:, 0], dims=("t", "row", "col"))
    aligned, report = align(array)
    check_shifts(report)
    check_same(aligned, array)
    assert "shift_x_metres" not in report


# --- folders of products ---


def test_landsat_collection_2(tmp_path):
    values = frames(bands=2)
    values[2, :, 10:14, 10:14] = 0
    for number, day in enumerate(COMPACT):
        stem = f"LC08_L2SP_190027_{day}_20200822_02_T1"
        for band, name in enumerate(("SR_B4", "SR_B5")):
            write(tmp_path / f"{stem}_{name}.TIF", values[number, band], nodata=0)
        write(tmp_path / f"{stem}_QA_PIXEL.TIF", classes((21824, 22280), "uint16")[number], nodata=1)
        (tmp_path / f"{stem}_MTL.txt").write_text("GROUP = LANDSAT_METADATA_FILE")
    patterns = {"red": "*_SR_B4.TIF", "nir": "*_SR_B5.TIF", "qa_pixel": "*_QA_PIXEL.TIF"}
    dataset = ta.open_stack(tmp_path, bands=patterns)
    assert list(dataset) == list(patterns)
    assert [dataset[name].attrs["_FillValue"] for name in patterns] == [0, 0, 1]
    aligned, report = align(dataset)
    check_shifts(report)
    check_classes(aligned.qa_pixel, dataset.qa_pixel)
    written = ta.write_stack(aligned, tmp_path / "out")
    assert {path.name for path in written} == {path.name for path in tmp_path.glob("*.TIF")}
    again = ta.open_stack(
        tmp_path / "out", bands={key: value.replace("TIF", "tif") for key, value in patterns.items()}
    )
    for name in patterns:
        np.testing.assert_array_equal(again[name], aligned[name])
        assert again[name].attrs["_FillValue"] == dataset[name].attrs["_FillValue"]
    (tmp_path / f"LC08_L2SP_190027_{COMPACT[1]}_20200822_02_T1_SR_B5.TIF").unlink()
    with pytest.raises(ValueError, match="errors="):  # a band whose file is missing
        ta.open_stack(tmp_path, bands=patterns)
    assert ta.open_stack(tmp_path, bands=patterns, errors="skip").sizes["time"] == 2


def test_sentinel2_safe(tmp_path):
    """Bands of 10 and 20 m as JPEG 2000, in folders in folders."""
    for number, day in enumerate(COMPACT):
        granule = (
            tmp_path
            / f"S2A_MSIL2A_{day}T101021_N0500_R022_T33TWM_{day}T140000.SAFE"
            / "GRANULE"
            / "L2A"
            / "IMG_DATA"
        )
        for folder, name, values in (
            ("R10m", "B04_10m", frames()[number, 0]),
            ("R20m", "SCL_20m", classes()[number][::2, ::2]),
        ):
            transform = TEN if folder == "R10m" else place(20.0)
            options = {"driver": "JP2OpenJPEG", "QUALITY": "100", "REVERSIBLE": "YES", "nodata": None}
            write(
                granule / folder / f"T33TWM_{day}T101021_{name}.jp2", values, transform=transform, **options
            )
    patterns = {"B04": "*_B04_10m.jp2", "SCL": "*_SCL_20m.jp2"}
    with pytest.raises(ValueError, match=r"bands of one grid.*grid=\"first\""):
        ta.open_stack(tmp_path, bands=patterns, recursive=True)
    dataset = ta.open_stack(tmp_path, bands=patterns, recursive=True, grid="first")
    assert dataset.B04.shape == dataset.SCL.shape == (3, SIZE, SIZE)
    np.testing.assert_array_equal(dataset.B04, frames()[:, 0])
    np.testing.assert_array_equal(dataset.SCL[:, ::2, ::2], classes()[:, ::2, ::2])  # nearest
    assert dataset.resampled.all()  # SCL was
    aligned, report = align(dataset)
    check_shifts(report)
    check_classes(aligned.SCL, dataset.SCL, 0.8)  # its own pixels are of 20 m
    assert report.resampled.all()
    with pytest.raises(FileNotFoundError, match="recursive=True"):
        ta.open_stack(tmp_path, pattern="*.jp2")


def test_sentinel2_cogs_and_hls(tmp_path):
    yearday = ["2020005", "2020015", "2020025"]
    for number, day in enumerate(yearday):
        stem = f"HLS.S30.T33TWM.{day}T100000.v2.0"
        write(tmp_path / f"{stem}.B04.tif", frames("int16")[number, 0], nodata=-9999, driver="COG")
        write(tmp_path / f"{stem}.Fmask.tif", classes((64, 66))[number], nodata=255, driver="COG")
    dataset = ta.open_stack(tmp_path, bands={"red": "*.B04.tif", "Fmask": "*.Fmask.tif"})
    assert [str(day)[:10] for day in dataset.time.values] == DAYS
    aligned, report = align(dataset)
    check_shifts(report)
    check_classes(aligned.Fmask, dataset.Fmask)


def test_planet_with_udm2(tmp_path):
    for number, day in enumerate(COMPACT):
        stem = f"{day}_093012_1032_3B"
        write(
            tmp_path / f"{stem}_AnalyticMS_SR.tif",
            frames(bands=4)[number],
            nodata=0,
            names=("blue", "green", "red", "nir"),
        )
        write(tmp_path / f"{stem}_udm2.tif", np.repeat(classes((0, 1))[number][None], 8, 0))
    dataset = ta.open_stack(tmp_path, bands={"sr": "*_SR.tif", "udm2": "*_udm2.tif"})
    assert dataset.time.values[0] == np.datetime64("2020-01-05T09:30:12")
    aligned, report = align(dataset)
    check_shifts(report)
    check_classes(aligned.udm2.values[:, 0], dataset.udm2.values[:, 0])
    assert aligned.sr.dims == dataset.sr.dims == ("time", "band_sr", "y", "x")
    assert aligned.sr.dtype == "uint16"
    written = ta.write_stack(aligned, tmp_path / "out")
    assert {path.name for path in written} == {path.name for path in tmp_path.glob("*.tif")}


def test_near_infrared_that_gdal_calls_alpha(tmp_path):
    """The fourth band of 8 bits, whatever is in it."""
    for number, day in enumerate(COMPACT):
        path = write(tmp_path / f"{day}.tif", frames("uint8", bands=4, low=20, high=250)[number])
        with rasterio.open(path) as file:
            assert file.colorinterp[-1] == ColorInterp.alpha
    cube = ta.open_stack(tmp_path)
    assert cube.sizes["band"] == 4
    _, report = align(cube)
    check_shifts(report)
    for path in ta.write_stack(cube, tmp_path / "out"):
        assert read_all(path) == read_all(tmp_path / path.name)


def gcp_list(offset=0.0):
    def place(row, column):
        return GroundControlPoint(row, column, 10 + 1e-4 * (column + offset), 50 - 1e-4 * row, 0.0)

    return [place(row, column) for row in (0, 32, 64) for column in (0, 32, 64)]


def test_sentinel1_grd_with_ground_control_points(tmp_path):
    for number, day in enumerate(COMPACT):
        path = tmp_path / f"s1a-iw-grd-vv-{day}t051234-{day}t051300-000001.tiff"
        gcps = gcp_list(OFFSETS[number][1])
        write(path, frames()[number, 0], crs=None, transform=Affine.identity(), gcps=gcps, nodata=0)
    with pytest.raises(ValueError, match=r"ground control points.*grid="):
        ta.open_stack(tmp_path, pattern="*.tiff")
    cube = ta.open_stack(tmp_path, pattern="*.tiff", grid="first")
    assert cube.resampled.all()
    check_rows(tmp_path, pattern="*.tiff")
    assert cube.attrs["_FillValue"] == 0
    assert abs(float(cube.x[0]) - (10 + 1e-4 * 8.5)) < 1e-4  # where the points of the first frame say
    aligned, report = align(cube)
    assert (report.status == 0).all()
    check_same(aligned, cube)


def test_ground_control_points_that_all_share_are_kept(tmp_path):
    for number, day in enumerate(COMPACT):
        write(
            tmp_path / f"{day}.tif",
            frames()[number, 0],
            crs=None,
            transform=Affine.identity(),
            gcps=gcp_list(),
        )
    cube = ta.open_stack(tmp_path)
    aligned, report = align(cube)
    check_shifts(report)
    [first, *_] = ta.write_stack(aligned, tmp_path / "out", driver="GTiff")
    with rasterio.open(first) as file:
        points, crs = file.gcps
        assert [(p.row, p.col, p.x, p.y) for p in points] == [(p.row, p.col, p.x, p.y) for p in gcp_list()]
        assert crs == CRS.from_epsg(4326)


def test_modis_sinusoidal(tmp_path):
    sinusoidal = "+proj=sinu +lon_0=0 +x_0=0 +y_0=0 +R=6371007.181 +units=m +no_defs"
    transform = Affine(463.3127, 0, 1_111_950.5, 0, -463.3127, 5_559_752.6)
    for number, day in enumerate(("A2020005", "A2020015", "A2020025")):
        path = tmp_path / f"MOD09GA.{day}.h19v04.061.tif"
        write(path, frames("int16")[number, 0], crs=sinusoidal, transform=transform, nodata=-28672)
    cube = ta.open_stack(tmp_path)
    assert [str(day)[:10] for day in cube.time.values] == DAYS
    aligned, report = align(cube)
    check_shifts(report)
    check_same(aligned, cube)
    assert report.shift_x_metres[1] == pytest.approx(2 * 463.3, rel=0.05)


# --- files whose pixels lie elsewhere ---


def write_dates(folder, **options):
    values = frames(bands=2)
    return [
        write(folder / f"{day}.tif", values[number], nodata=0, **options)
        for number, day in enumerate(COMPACT)
    ]


def test_origins_that_differ_by_rounding(tmp_path):
    for number, day in enumerate(COMPACT):
        write(tmp_path / f"{day}.tif", frames()[number], transform=place(right=1e-7 * number))
    cube = ta.open_stack(tmp_path)
    np.testing.assert_array_equal(cube, frames())
    assert "resampled" not in cube.coords


@pytest.mark.parametrize("nodata", [0, None])
@pytest.mark.parametrize("chunks", [None, 1])
def test_extents_that_differ_are_cut_and_padded_by_whole_pixels(tmp_path, nodata, chunks):
    values = frames()
    for number, day in enumerate(COMPACT):
        moved = place(right=-10 * number, down=20 * number)
        write(tmp_path / f"{day}.tif", values[number, :, : SIZE - number], transform=moved, nodata=nodata)
    with pytest.raises(ValueError, match=r"grid=\"first\", \"union\" or \"intersection\""):
        ta.open_stack(tmp_path)
    options = {"chunks": chunks, "errors": "skip"}
    union = ta.open_stack(tmp_path, grid="union", **options)
    assert union.shape == (3, 1, 66, 66)
    assert "resampled" not in union.coords
    np.testing.assert_array_equal(union[1, 0, 2 : 2 + SIZE - 1, 1 : 1 + SIZE], values[1, 0, : SIZE - 1])
    outside = union[0, 0, SIZE:, :]
    assert (outside == 0).all()
    assert ("usable" in union.coords) == (nodata is None)
    if nodata is None:  # what no file reaches is marked
        assert not union.usable[0, SIZE:, :].any()
        assert union.usable[0, :SIZE, 2:].all()
    inner = ta.open_stack(tmp_path, grid="intersection", **options)
    assert inner.shape == (3, 1, 60, 62)
    np.testing.assert_array_equal(inner[0, 0], values[0, 0, 4:64, : SIZE - 2])
    same = ta.open_stack(tmp_path, grid=inner, **options)
    np.testing.assert_array_equal(same, inner)
    like = ta.open_stack(tmp_path, grid=tmp_path / f"{COMPACT[1]}.tif", **options)
    np.testing.assert_array_equal(like[1], values[1, :, : SIZE - 1])
    with pytest.raises(ValueError, match="grid: expected one of 'first'"):
        ta.open_stack(tmp_path, grid="nowhere")


def test_extents_that_do_not_overlap(tmp_path):
    for number, day in enumerate(COMPACT):
        write(tmp_path / f"{day}.tif", frames()[number], transform=place(right=1e4 * number))
    with pytest.raises(ValueError, match=r"files that overlap.*grid=\"union\""):
        ta.open_stack(tmp_path, grid="intersection")


@pytest.mark.filterwarnings("ignore:Use `@` matmul")  # within rasterio
@pytest.mark.parametrize("nodata", [0, None])
def test_two_utm_zones_and_pixel_sizes(tmp_path, nodata):
    from rasterio.warp import Resampling, calculate_default_transform, reproject

    values = frames(bands=1)
    write(tmp_path / f"{COMPACT[0]}.tif", values[0], nodata=nodata)
    bounds = rasterio.transform.array_bounds(SIZE, SIZE, TEN)
    where, width, height = calculate_default_transform(UTM, "EPSG:32632", SIZE, SIZE, *bounds)
    other = np.zeros((1, height, width), "uint16")
    reproject(values[1], other, src_transform=TEN, src_crs=UTM, dst_transform=where, dst_crs="EPSG:32632",
              resampling=Resampling.cubic)  # fmt: skip
    write(tmp_path / f"{COMPACT[1]}.tif", other, crs="EPSG:32632", transform=where, nodata=nodata)
    cube = ta.open_stack(tmp_path, grid="first")
    assert cube.resampled.values.tolist() == [False, True]
    np.testing.assert_array_equal(cube[0], values[0])
    if nodata is None:
        assert cube.usable[0].all()
    _, report = align(cube)
    check_shifts(report, 0.15, TRUTH[:2])
    assert report.resampled.values.tolist() == [False, True]
    lazy = ta.open_stack(tmp_path, grid="first", chunks=1)
    np.testing.assert_array_equal(lazy.compute(), cube)
    check_rows(tmp_path)


def test_our_own_corrected_georeferences(tmp_path):
    write_dates(tmp_path)
    cube = ta.open_stack(tmp_path)
    _, report = align(cube)
    ta.write_stack(ta.apply(cube, report, mode="shift-coords"), tmp_path / "moved", driver="GTiff")
    with pytest.raises(ValueError, match="grid="):
        ta.open_stack(tmp_path / "moved")
    again = ta.open_stack(tmp_path / "moved", grid="first")
    _, after = align(again)
    check_shifts(after, 0.1, 0 * TRUTH)


# --- where files lie ---


def test_subfolders_by_date(tmp_path):
    for number, day in enumerate(DAYS):
        write(tmp_path / day / "B04.tif", frames()[number])
    cube = ta.open_stack(tmp_path, recursive=True)
    assert [str(day)[:10] for day in cube.time.values] == DAYS
    names = [path.name for path in ta.write_stack(cube, tmp_path / "out")]
    assert names == [f"{day}_B04.tif" for day in DAYS]  # told apart by their folders


def test_manifest(tmp_path):
    for number, name in enumerate("abc"):
        write(tmp_path / "files" / f"{name}.tif", frames()[number])
    lines = [f"files/{name}.tif,{day}" for name, day in zip("abc", DAYS, strict=True)]
    (tmp_path / "list.csv").write_text("\n".join(["path,time", *lines]))
    cube = ta.open_stack(tmp_path / "list.csv")
    assert [str(day)[:10] for day in cube.time.values] == DAYS
    (tmp_path / "bands.csv").write_text("\n".join(["path,time,band", *(f"{line},red" for line in lines)]))
    assert list(ta.open_stack(tmp_path / "bands.csv")) == ["red"]
    (tmp_path / "bad.csv").write_text("file\na.tif")
    with pytest.raises(ValueError, match="with a path in every line"):
        ta.open_stack(tmp_path / "bad.csv")


def test_globs_and_home(tmp_path, monkeypatch):
    write_dates(tmp_path / "in")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ta.open_stack("~/in").sizes["time"] == 3
    assert ta.open_stack(f"{tmp_path}/in/2020011*.tif").sizes["time"] == 1
    assert ta.open_stack(f"{tmp_path}/**/*.tif").sizes["time"] == 3
    with pytest.raises(FileNotFoundError, match="like which there is nothing"):
        ta.open_stack(f"{tmp_path}/in/1999*.tif")


def test_inside_a_zip(tmp_path):
    paths = write_dates(tmp_path / "in")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in paths:
            archive.write(path, path.name)
    names = [f"/vsizip/{tmp_path}/all.zip/{path.name}" for path in paths]
    np.testing.assert_array_equal(ta.open_stack(names), ta.open_stack(tmp_path / "in"))


def test_datasets_inside_a_file(tmp_path):
    pytest.importorskip("h5netcdf")
    names = []
    for number, day in enumerate(COMPACT):
        values = (("y", "x"), frames()[number, 0])
        inside = xr.Dataset({"red": values, "nir": values}, axes())
        inside.to_netcdf(tmp_path / f"{day}.nc", engine="h5netcdf")
        names.append(f'NETCDF:"{tmp_path}/{day}.nc":red')
    cube = ta.open_stack(names)
    for number, name in enumerate(names):
        with rasterio.open(name) as file:
            np.testing.assert_array_equal(cube[number], file.read())
    _, report = align(cube)
    assert (report.status == 0).all()
    with pytest.raises(ValueError, match="2 datasets inside"):
        ta.open_stack(tmp_path, pattern="*.nc")


@pytest.fixture
def served(tmp_path):
    """An address of the folder; of another process, for rasterio keeps the interpreter while it waits."""
    command = [sys.executable, str(Path(__file__).with_name("served.py")), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process.stdout.readline().strip()
        process.kill()


def test_cog_over_http(tmp_path, served, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    paths = write_dates(tmp_path, driver="COG")
    cube = ta.open_stack([f"{served}/{path.name}" for path in paths], chunks=1)
    np.testing.assert_array_equal(cube.compute(), ta.open_stack(tmp_path))
    with pytest.raises(ValueError, match="it cannot be read"):
        ta.open_stack(f"{served}/20200105_missing.tif")


@pytest.mark.parametrize(
    ("names", "days"),
    [
        (
            ("scene_13-01-2020", "scene_02-02-2020", "scene_05-04-2020"),
            ("2020-01-13", "2020-02-02", "2020-04-05"),
        ),
        (("01.13.2020", "02.05.2020", "03.04.2020"), ("2020-01-13", "2020-02-05", "2020-03-04")),
        (("A2020001", "A2020032", "A2020366"), ("2020-01-01", "2020-02-01", "2020-12-31")),
        (("x_2020.01.05", "x_2020.01.15", "x_2020.01.25"), DAYS),
    ],
)
def test_dates_in_names(tmp_path, names, days):
    for number, name in enumerate(names):
        write(tmp_path / f"{name}.tif", frames()[number])
    assert [str(day)[:10] for day in ta.open_stack(tmp_path).time.values] == list(days)


def test_dates_that_may_be_read_two_ways_are_refused(tmp_path):
    for number, name in enumerate(("01-02-2020", "02-03-2020")):
        write(tmp_path / f"{name}.tif", frames()[number])
    with pytest.raises(ValueError, match="day first or month first; pass time="):
        ta.open_stack(tmp_path)
    cube = ta.open_stack(tmp_path, time=lambda path: "-".join(reversed(path.stem.split("-"))))
    assert str(cube.time.values[0])[:10] == "2020-02-01"


# --- what is in the files beside pixels ---


def read_all(path):
    with rasterio.open(path) as file:
        return {
            "pixels": file.read().tobytes(),
            "masks": file.read_masks().tobytes(),
            "colours": file.colorinterp,
            "flags": file.mask_flag_enums,
            "transform": file.transform,
            "crs": file.crs,
            "nodata": file.nodata,
            "names": file.descriptions,
            "scales": (file.scales, file.offsets, file.units),
            "dtypes": file.dtypes,
            "tags": {key: value for key, value in file.tags().items() if key != "OVR_RESAMPLING_ALG"},
        }


@pytest.mark.parametrize("driver", ["GTiff", "COG"])
@pytest.mark.parametrize("chunks", [None, 1])
@pytest.mark.parametrize("kind", ["alpha", "inside", "beside"])
def test_alpha_bands_and_masks(tmp_path, kind, chunks, driver):
    values = frames("uint8", bands=3, low=10, high=250)
    clear = np.full((3, SIZE, SIZE), 255, "uint8")
    clear[1, :20, :24] = 0
    values[1, :, :20, :24] = 255  # a mask that were not used would spoil the estimate
    if kind == "alpha":
        clear[1, 30, 30] = 128  # half transparent stays half transparent
    for number, day in enumerate(COMPACT):
        extra = (
            {"alpha": clear[number]}
            if kind == "alpha"
            else {"mask": clear[number], "inside": kind == "inside"}
        )
        write(tmp_path / f"{day}.tif", values[number], photometric="RGB", **extra)
    assert (tmp_path / f"{COMPACT[0]}.tif.msk").exists() == (kind == "beside")
    cube = ta.open_stack(tmp_path, chunks=chunks)
    assert cube.sizes["band"] == 3
    np.testing.assert_array_equal(cube.usable, clear)
    same = ta.write_stack(cube, tmp_path / "same", driver=driver)
    for path in same:
        assert read_all(path) == read_all(tmp_path / path.name)
    aligned, report = align(cube)
    check_shifts(report.compute())
    usable = np.asarray(aligned.usable)
    assert not usable[1, 1:18, 4:24].any()  # it moved with its frame
    assert not usable[1, :, :1].any()  # nothing came from outside
    assert usable[1, 25:-3, 30:].all()
    written = ta.write_stack(aligned, tmp_path / "out", driver=driver)
    with rasterio.open(written[1]) as file:
        own = file.read(4) if kind == "alpha" else file.read_masks(1)
        np.testing.assert_array_equal(own, usable[1])


def test_colour_tables_tags_and_overviews(tmp_path):
    table = {0: (0, 0, 0, 255), 4: (10, 200, 30, 255), 8: (255, 255, 255, 255)}
    for number, day in enumerate(COMPACT):
        tags = {"SENSOR": "S2", "CLOUD": str(number), "AREA_OR_POINT": "Area"}
        path = write(tmp_path / f"{day}.tif", classes()[number], table=table, nodata=0, tags=tags)
        with rasterio.open(path, "r+") as file:
            file.build_overviews([2, 4])
            file.update_tags(1, STATISTICS_MEAN="5")
    cube = ta.open_stack(tmp_path)
    moved = ta.apply(cube, np.repeat(np.eye(2, 3)[None], 3, 0), interpolation="nearest")
    for driver in ("GTiff", "COG"):
        for number, path in enumerate(ta.write_stack(moved, tmp_path / driver, driver=driver)):
            assert read_all(path) == read_all(tmp_path / path.name)
            with rasterio.open(path) as file:
                found = file.colormap(1)
                assert {key: found[key] for key in (4, 8)} == {key: table[key] for key in (4, 8)}
                assert file.tags()["CLOUD"] == str(number)
                assert "STATISTICS_MEAN" not in file.tags(1)
                assert file.overviews(1) == ([2, 4] if driver == "GTiff" else [])


def test_scales_offsets_and_nodata(tmp_path):
    values = frames("int16", bands=2)
    values[1, :, 40:44, 40:44] = -9999
    for number, day in enumerate(COMPACT):
        path = write(tmp_path / f"{day}.tif", values[number], nodata=-9999, names=("B04", "B08"))
        with rasterio.open(path, "r+") as file:
            file.scales, file.offsets, file.units = (1e-4, 2e-4), (0.0, -0.1), ("1", "K")
            file.update_tags(AREA_OR_POINT="Point")
    cube = ta.open_stack(tmp_path)
    aligned, report = align(cube)
    check_shifts(report)
    check_same(aligned, cube)
    assert aligned.values[aligned.values < 0].min() == aligned.values[aligned.values < 0].max() == -9999
    first, *_ = ta.write_stack(aligned, tmp_path / "out")
    assert read_all(first) == read_all(tmp_path / first.name)


def test_pictures_without_a_place(tmp_path):
    for number, day in enumerate(COMPACT):
        write(
            tmp_path / f"{day}.png",
            frames("uint8", low=0, high=250)[number],
            driver="PNG",
            crs=None,
            transform=None,
        )
    cube = ta.open_stack(tmp_path, pattern="*.png")
    _, report = align(cube)
    check_shifts(report)
    with pytest.raises(ValueError, match="files with a georeference"):
        ta.open_stack(tmp_path, pattern="*.png", grid="union")


# --- what looks wrong is said ---


def test_an_undeclared_fill_is_said():
    values = frames("int16")
    values[1, :, :20, :20] = -9999
    array = xr.DataArray(values[:, 0], times(), ("time", "y", "x"))
    with pytest.warns(UserWarning, match=r"the value -9999 covers a part of 1 of 3 frames.*_FillValue"):
        _, report = align(array)
    assert "-9999" in report.attrs["notes"]
    array.attrs["_FillValue"] = -9999
    aligned, report = align(array)  # a warning would fail the test
    check_shifts(report)
    assert set(np.unique(aligned.values[aligned.values < 300])) == {-9999}
    values = frames("uint16", low=1)
    y, x = np.mgrid[:SIZE, :SIZE]
    values[:, :, np.hypot(y - 32, x - 32) > 28] = 0  # clipped to an area, near the scene's own level
    with pytest.warns(UserWarning, match="the value 0 covers a part of 3 of 3 frames"):
        align(xr.DataArray(values[:, 0], times(), ("time", "y", "x")))


def test_masks_that_look_wrong_are_said():
    array = xr.DataArray(frames("float32")[:, 0], times(), ("time", "y", "x"))
    with pytest.warns(UserWarning, match=r"no pixel is usable \(all False\).*clouds == 0"):
        _, report = align(array, mask=np.zeros((SIZE, SIZE), bool))
    assert report.attrs["status_counts"] == "NO_TEXTURE: 3"
    random = np.random.default_rng(0)
    clouds = np.zeros((3, SIZE, SIZE), bool)
    for number in range(3):
        clouds[number, 15 * number : 15 * number + 20] = True
    array.values[clouds] = random.uniform(4000, 9000, clouds.sum())
    with pytest.warns(UserWarning, match="if 1 = cloud, pass `mask == 0`"):
        align(array, mask=clouds)
    align(array, mask=~clouds)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_reference_without_usable_pixels_is_said(lazy):
    array = xr.DataArray(frames("int16")[:, 0], times(), ("time", "y", "x"), attrs={"_FillValue": -9999})
    array[0] = -9999
    given = array.chunk(time=1) if lazy else array
    clear = xr.ones_like(array, bool)
    clear[1] = False
    for reference, name, options in (
        ("first", "first", {}), (array[0], "DataArray", {}), (DAYS[1], DAYS[1], {"mask": clear})
    ):  # fmt: skip
        with pytest.warns(UserWarning, match=rf"^reference: {name} has no usable pixel.*\"clearest\"$"):
            _, report = ta.align(given, reference, "pcc", **options)
        assert report.attrs["notes"].startswith(f"reference: {name} has no usable pixel")
        assert (report.status == ta.Status.NO_TEXTURE).all()
    _, report = ta.align(given, "clearest", "pcc")  # a warning would fail the test
    assert report.status.values.tolist() == [ta.Status.NO_TEXTURE, 0, 0]


def test_reports_to_look_at(tmp_path):
    """GeoJSON: the outline of a frame that was 2 px left and 1 px low; HTML: a page."""
    dataset = odc_dataset()
    _, report = align(dataset)
    path = ta.save_report(report, tmp_path / "frames.geojson")
    features = json.loads(path.read_text())["features"]
    assert [one["properties"]["time"][:10] for one in features] == DAYS
    assert [one["properties"]["status"] for one in features] == ["OK"] * 3
    assert features[1]["properties"]["shift_x"] == pytest.approx(2, abs=0.1)
    corner = np.array([one["geometry"]["coordinates"][0][0] for one in features])
    x, y = move_points("EPSG:4326", UTM, corner[:, 0].tolist(), corner[:, 1].tolist())
    np.testing.assert_allclose(np.array(x) - 500_000, 10 * report.shift_x, atol=0.5)
    np.testing.assert_allclose(np.array(y) - 5_000_000, -10 * report.shift_y, atol=0.5)
    with pytest.raises(ValueError, match="a grid with a CRS"):
        ta.save_report(align(dataset.drop_vars("spatial_ref"))[1], tmp_path / "no.geojson")
    pytest.importorskip("matplotlib")
    assert "<html" in ta.save_report(report, tmp_path / "page.html").read_text()
    with pytest.raises(FileExistsError):
        ta.save_report(report, tmp_path / "page.html")
    with pytest.raises(ValueError, match=r"\.geojson"):
        ta.save_report(report, tmp_path / "page.xml")


def test_every_kind_is_in_the_docs():
    """docs/inputs.md names the test of every line of its table, and these are all."""
    text = (Path(__file__).parents[1] / "docs" / "inputs.md").read_text()
    own = {name for name in globals() if name.startswith("test_")} - {
        "test_every_kind_is_in_the_docs",
        "test_reports_to_look_at",
    }
    named = {
        word.strip("`")
        for line in text.splitlines()
        if line.startswith("|")
        for word in line.split()
        if "`test_" in word
    }
    assert named == own
