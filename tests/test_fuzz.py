"""Random small cubes and files: never an error of another library, never a silent loss.

``TORCHALIGN_TEST_CASES=500`` makes more of them.
"""

from __future__ import annotations

import os
import warnings

import numpy as np
import pytest
import torch
import xarray as xr

import torchalign as ta

rasterio = pytest.importorskip("rasterio", reason='pip install "torchalign[io]"')
pytest.importorskip("dask", reason='pip install "torchalign[dask]"')
from rasterio.transform import Affine  # noqa: E402

CASES = int(os.environ.get("TORCHALIGN_TEST_CASES", "30"))  # of cubes, and as many of files
# unless more are asked for, the second half is slow
each_seed = pytest.mark.parametrize(
    "seed",
    [pytest.param(seed, marks=[pytest.mark.slow] * (15 <= seed < 30 == CASES)) for seed in range(CASES)],
)
DTYPES = ("uint8", "int16", "uint16", "int32", "uint32", "float32", "float64")
CRSS = ("EPSG:32633", "EPSG:4326", "EPSG:3857", None)
ALIGNER = ta.PCC(max_translation=3)


def pick(random, *choices):
    return choices[random.integers(len(choices))]


def random_pixels(random, shape, dtype, nodata):
    y, x = np.mgrid[: shape[-2], : shape[-1]]
    smooth = (
        np.sin(x / 3 + random.normal()) + np.cos(y / 4 + random.normal()) + 0.3 * random.normal(size=shape)
    )
    values = (120 + 25 * smooth).clip(1, 254).astype(dtype)
    if pick(random, True, False) and nodata is not None:
        values[random.random(shape) < 0.05] = nodata
    if np.dtype(dtype).kind == "f" and pick(random, True, False):
        values[random.random(shape) < 0.05] = np.nan
    return values


def ours(error):
    """Whether an error has our wording: a name, what was expected, what came, and a cure."""
    text = str(error)
    return (
        isinstance(error, (ValueError, TypeError))
        and ": expected " in text
        and ", got " in text
        and "; " in text
    )


def complain(error):
    assert ours(error), repr(error)


def random_cube(random):
    frames, bands = pick(random, 1, 2, 3, 5), pick(random, 0, 1, 3)
    size = pick(random, 1, 7, 16, 33), pick(random, 2, 8, 24, 31)
    dtype = (
        pick(random, *DTYPES, "bool", "complex64", "<U3") if random.random() < 0.3 else pick(random, *DTYPES)
    )
    nodata = pick(random, None, 0, 255) if dtype in DTYPES else None
    names = [pick(random, "time", "t", "date", "valid_time", "epoch"), pick(random, "band", "channel", "spectrum"),
             pick(random, "y", "lat", "northing"), pick(random, "x", "lon", "easting")]  # fmt: skip
    shape = [frames, bands, *size]
    if not bands:
        del names[1], shape[1]
    plain = dtype if dtype in DTYPES else "float32"
    values = random_pixels(random, tuple(shape), plain, nodata).astype(dtype)
    coords = {}
    if pick(random, True, False):
        days = np.datetime64("2020-01-01", "ns") + np.arange(frames) * np.timedelta64(5, "D")
        coords[names[0]] = pick(random, days, np.arange(frames), days[::-1])
    if pick(random, True, False):
        coords[names[-1]] = 500.0 + 10 * np.arange(size[1])
        coords[names[-2]] = pick(random, 1, -1) * 10.0 * np.arange(size[0])
    if bands and pick(random, True, False):
        coords[names[1]] = [
            pick(random, "red", "SCL", "B8") + str(number) * (number > 0) for number in range(bands)
        ]
    array = xr.DataArray(values, coords, names)
    array = array.transpose(*random.permutation(names))
    if nodata is not None:
        array.attrs[pick(random, "_FillValue", "nodata", "missing_value")] = nodata
    if pick(random, True, False, False):
        array = array.chunk({names[0]: pick(random, 1, 2)})
    if pick(random, True, False, False, False):
        return xr.Dataset(
            {"a": array, "SCL": xr.zeros_like(array, "uint8") if dtype in DTYPES else array, "plain": 3}
        )
    return array


@each_seed
def test_cubes(seed):
    random = np.random.default_rng(seed)
    cube = random_cube(random)
    options = {"mask": pick(random, None, "all")} if isinstance(cube, xr.DataArray) else {}
    if options.get("mask"):
        options["mask"] = xr.ones_like(cube, bool)  # with bands, too: refused or reduced
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # hints
        try:
            aligned, report = ta.align(cube, pick(random, "first", "median"), ALIGNER, **options)
        except Exception as error:
            complain(error)
            return
        aligned, report = aligned.compute(), report.compute()
    assert set(report.status.values.tolist()) <= set(range(9))
    assert np.isfinite(report.warp.values).all()
    check_like(aligned, cube, report)
    again = ta.apply(
        cube, report, interpolation="bilinear" if isinstance(cube, xr.DataArray) else None
    ).compute()
    assert again.sizes == cube.sizes


def check_like(aligned, cube, report):
    """Dims, dtypes, labels, nodata; frames that were not aligned bit for bit."""
    if isinstance(cube, xr.Dataset):
        assert list(aligned) == list(cube)
        for name in cube:
            check_like(aligned[name], cube[name], report)
        return
    assert (aligned.dims, aligned.dtype, aligned.shape) == (cube.dims, cube.dtype, cube.shape)
    assert aligned.attrs == cube.attrs
    assert set(aligned.coords) == set(cube.coords)
    time = report.status.dims[0]
    if time not in cube.dims:
        return
    for number in np.flatnonzero(report.status.values):
        before, after = (one.isel({time: int(number)}).values for one in (cube, aligned))
        np.testing.assert_array_equal(after, before)


def random_folder(random, folder):
    frames, dtype = pick(random, 1, 2, 4), pick(random, *DTYPES)
    nodata = pick(random, None, 0, 255)
    bands, size = pick(random, 1, 2, 4), (pick(random, 5, 16, 40), pick(random, 4, 20, 33))
    crs, step = pick(random, *CRSS), pick(random, 10.0, 0.001)
    for number in range(frames):
        own_size = size if random.random() < 0.8 else (size[0] + 1, size[1])
        own_crs = crs if random.random() < 0.9 else pick(random, *CRSS)
        place = Affine(step, 0, 10.0 + step * pick(random, 0, 0, 0, 1, 0.5), 0, -step, 20.0)
        values = random_pixels(random, (bands, *own_size), dtype, nodata)
        name = pick(
            random,
            f"2020010{number + 1}.tif",
            f"s_2020-01-0{number + 1}.tif",
            f"A202000{number + 1}.tif",
            f"x{number}.tif",
        )
        profile = {"driver": "GTiff", "count": bands, "height": own_size[0], "width": own_size[1], "dtype": dtype,
                   "crs": own_crs, "transform": place, "nodata": nodata}  # fmt: skip
        with rasterio.open(folder / name, "w", **profile) as file:
            file.write(values)
            if random.random() < 0.2:
                file.write_mask(random.random(own_size) < 0.7)
    if random.random() < 0.15:
        (folder / "20200109.tif").write_bytes(b"no raster")


@pytest.mark.filterwarnings("ignore")  # of GDAL, about files without a place
@each_seed
def test_folders(seed, tmp_path):
    random = np.random.default_rng(10_000 + seed)
    random_folder(random, tmp_path)
    options = {
        "grid": pick(random, None, None, "first", "union", "intersection"),
        "chunks": pick(random, None, 1),
    }
    options["errors"] = pick(random, "raise", "skip")
    try:
        cube = ta.open_stack(tmp_path, **options)
    except Exception as error:
        complain(error)
        return
    total = len(list(tmp_path.glob("*.tif")))
    assert cube.sizes["time"] + len(cube.attrs.get("skipped_files", [])) == total  # nothing is lost unsaid
    if options["grid"] is None:
        for number, name in enumerate(cube.file.values):
            with rasterio.open(tmp_path / name) as file:
                np.testing.assert_array_equal(cube[number].values, file.read())
                assert (
                    np.allclose(cube.attrs.get("_FillValue", np.nan), file.nodata or np.nan, equal_nan=True)
                    or file.nodata == 0
                )
    paths = ta.write_stack(cube, tmp_path / "out", driver="GTiff", template="{number}.tif")
    for number, path in enumerate(paths):
        with rasterio.open(path) as file:
            np.testing.assert_array_equal(file.read()[: cube.sizes["band"]], cube[number].values)
    aligned, report = ta.align(cube, "first", ALIGNER)
    assert aligned.compute().dtype == cube.dtype
    assert np.isfinite(report.compute().warp.values).all()


# --- arguments of another kind ---

STRANGE = (object(), np.zeros(3), b"x", {}, 2.5, xr.DataArray(1))


def doors(folder):
    """Public functions with arguments that they take."""
    random = np.random.default_rng(0)
    array = xr.DataArray(
        random_pixels(random, (2, 2, 16, 16), "float32", None), dims=("time", "band", "y", "x")
    )
    array = array.fillna(0).assign_coords(time=np.array(["2020-01-01", "2020-01-02"], "datetime64[ns]"))
    dataset = array.to_dataset("band").rename_vars({0: "a", 1: "b"})
    _, report = ta.align(array, "first", ALIGNER)
    tensor, warp = torch.from_numpy(array.values), torch.eye(2, 3).repeat(2, 1, 1)
    ta.write_stack(array, folder / "in")
    dims = dict.fromkeys(("time_dim", "y_dim", "x_dim"))
    shared = {"mask": None, "device": None, "batch_size": None, "progress": None, "classes": None, **dims}
    writing = {"overwrite": True, "report": None}
    reading = {"pattern": "*.tif", "bands": None, "time": None, "errors": "raise", "recursive": False, "grid": None,
               "resampling": "bilinear"}  # fmt: skip
    names = {"template": None, "compression": "deflate"}
    return [
        (ta.warp, {"cube": tensor, "warp": warp, "interpolation": "bilinear", "padding_mode": "border",
                   "fill_value": None, "mask": None}),
        *((ta.align, {"datacube": cube, "reference": "first", "aligner": ALIGNER, "bands": None, "init": None,
                      "reference_mask": None, "verify": False, **shared}) for cube in (array, dataset)),
        *((ta.apply, {"datacube": cube, "estimate": report, "mode": "resample", "interpolation": None,
                      "padding_mode": "border", "fill_value": None, **shared}) for cube in (array, dataset)),
        (ta.extend, {"datacube": array.assign_coords(time=array.time + np.timedelta64(99, "D")), "report": report,
                     "archive": array, "aligner": "auto", "sun": None}),
        (ta.open_stack, {"source": folder / "in", "chunks": None, "keep_empty": False, **reading}),
        (ta.write_stack, {"cube": array, "folder": folder / "out", "driver": "GTiff", **names, **writing}),
        (ta.io.write_cube, {"cube": array, "path": folder / "out.nc", "attrs": None, **writing}),
        (ta.io.align_scenes, {"source": folder / "in", "folder": folder / "large", "reference": "first",
                              "aligner": ALIGNER, "mask": None, "overwrite": True, "progress": False, **names,
                              **reading}),
        (ta.save_report, {"report": report, "path": folder / "report.csv", "overwrite": True}),
        (ta.load_report, {"path": folder / "report.csv"}),
        (ta.to_table, {"report": report}),
        (ta.summarize, {"report": report}),
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_arguments_of_another_kind_are_refused_by_name(tmp_path):
    raw = []
    for function, arguments in doors(tmp_path):
        function(**arguments)
        for name in arguments:
            for value in STRANGE:
                try:
                    function(**(arguments | {name: value}))
                except (FileNotFoundError, FileExistsError):
                    continue
                except Exception as error:
                    if not ours(error):
                        raw.append(f"{function.__name__}({name}={value!r:.30}): {error!r:.120}")
    assert raw == []
