"""GeoTIFF → cube → GeoTIFF, against rasterio itself; and stores that are never seen half-written."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from series import make_series

import torchalign as ta
from torchalign.io import open_stack, parse_time, write_cube, write_stack

rasterio = pytest.importorskip("rasterio", reason='pip install "torchalign[io]"')
from rasterio.transform import Affine  # noqa: E402

# not multiples of anything: a transform that survives this survives
TRANSFORM = Affine(10.000000000001, 0.0, 499_980.123456789, 0.0, -9.99999999999, 5_000_040.987654321)


@contextmanager
def quiet():
    """A file without a georeference is no news to who made it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        yield


def write_tif(path, values, *, transform=TRANSFORM, crs="EPSG:32633", nodata=0, names=(), **options):
    scales, offsets = options.pop("scales", None), options.pop("offsets", None)
    profile = {"driver": "GTiff", "dtype": values.dtype, "nodata": nodata, "crs": crs, "transform": transform}
    height, width = values.shape[1:]
    profile |= {"count": len(values), "height": height, "width": width, **options}
    with quiet(), rasterio.open(path, "w", **profile) as file:
        file.write(values)
        for number, name in enumerate(names, 1):
            file.set_band_description(number, name)
        if scales:
            file.scales, file.offsets = scales, offsets


def describe_tif(path):
    """All that must survive, as rasterio reads it."""
    with quiet(), rasterio.open(path) as file:
        return {
            "transform": tuple(file.transform),
            "crs": file.crs,
            "dtypes": file.dtypes,
            "nodata": str(file.nodata),
            "descriptions": file.descriptions,
            "scales": file.scales,
            "offsets": file.offsets,
            "size": (file.height, file.width),
            "pixels": file.read().tobytes(),
        }


def make_folder(folder, frames=3, dtype="uint16", names=("B02", "B03"), size=(7, 9), **options):
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for number in range(frames):
        values = random.integers(0, 250, (len(names) or 2, *size)).astype(dtype)
        day = 5 + 10 * number
        write_tif(
            folder / f"201701{day:02d}T064632_2017011{number}T070007_T39PVM.tif",
            values,
            names=names,
            **options,
        )
    return sorted(folder.iterdir())


@pytest.mark.parametrize("chunks", [None, 2, "auto", {"time": 1, "y": 4}])
@pytest.mark.parametrize("driver", ["GTiff", "COG"])
def test_round_trip_is_bit_equal(tmp_path, chunks, driver):
    pytest.importorskip("dask") if chunks is not None else None
    paths = make_folder(tmp_path / "in")
    cube = open_stack(tmp_path / "in", chunks=chunks)
    assert cube.dims == ("time", "band", "y", "x")
    assert (cube.chunks is None) == (chunks is None)
    written = write_stack(cube, tmp_path / "out", driver=driver)
    assert [path.name for path in written] == [path.name for path in paths]
    for before, after in zip(paths, written, strict=True):
        assert describe_tif(after) == describe_tif(before)
    again = open_stack(tmp_path / "out")
    xr.testing.assert_identical(again, cube.compute())


@pytest.mark.parametrize(
    ("dtype", "nodata"),
    [("uint8", 255), ("int16", -9999), ("uint32", None), ("int32", -1), ("float32", np.nan), ("float32", -9999.0),
     ("float64", None), ("int8", -1)],
)  # fmt: skip
def test_round_trip_of_every_dtype(tmp_path, dtype, nodata):
    [before, *_] = make_folder(tmp_path / "in", 1, dtype, nodata=nodata)
    [after] = write_stack(open_stack(tmp_path / "in"), tmp_path / "out")
    assert describe_tif(after) == describe_tif(before)


@pytest.mark.parametrize(
    ("scales", "offsets"),
    [((1e-4, 1e-4), (-0.1, -0.1)), ((1e-4, 2e-4), (0.0, 1.0)), ((1.0, 1.0), (5.0, 5.0))],
)
def test_round_trip_of_scale_and_offset(tmp_path, scales, offsets):
    [before, *_] = make_folder(tmp_path / "in", 1, scales=scales, offsets=offsets)
    cube = open_stack(tmp_path / "in")
    [after] = write_stack(cube, tmp_path / "out")
    assert describe_tif(after) == describe_tif(before)
    assert cube.dtype == np.uint16  # not decoded: the pixels are the file's


@pytest.mark.parametrize(
    ("transform", "crs"),
    [
        (Affine(30.0, 0, -3.5, 0, 30.0, 7.25), "EPSG:3857"),  # south-up
        (Affine(0.1, 0.02, 5.0, -0.02, -0.1, 50.0), "EPSG:4326"),  # rotated
        (None, None),  # no georeference at all
    ],
)
def test_round_trip_of_other_grids(tmp_path, transform, crs):
    [before, *_] = make_folder(tmp_path / "in", 1, transform=transform, crs=crs)
    cube = open_stack(tmp_path / "in")
    [after] = write_stack(cube, tmp_path / "out", driver="GTiff")
    assert describe_tif(after) == describe_tif(before)
    assert ("x" in cube.coords) == (transform is not None and transform.b == 0)


@pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")  # rioxarray's own
def test_the_cube_is_what_rioxarray_reads(tmp_path):
    rioxarray = pytest.importorskip("rioxarray")
    paths = make_folder(tmp_path / "in")
    cube = open_stack(tmp_path / "in")
    with rioxarray.open_rasterio(paths[1]) as expected:
        np.testing.assert_array_equal(cube[1].values, expected.values)
        np.testing.assert_allclose(cube.x, expected.x, rtol=1e-15)
        np.testing.assert_allclose(cube.y, expected.y, rtol=1e-15)
        assert cube.rio.crs == expected.rio.crs
        assert cube.rio.transform() == expected.rio.transform()
        assert cube.rio.nodata == expected.rio.nodata
        assert cube.attrs["long_name"] == expected.attrs["long_name"]
    assert cube.band.values.tolist() == ["B02", "B03"]
    assert cube.time.dtype == "datetime64[ns]"
    assert cube.time.values[1] == np.datetime64("2017-01-15T06:46:32")
    assert cube.file.values.tolist() == [path.name for path in paths]


def test_a_crop_keeps_its_place(tmp_path):
    make_folder(tmp_path / "in", size=(12, 15))
    cube = open_stack(tmp_path / "in").isel(time=[0], y=slice(3, 9), x=slice(4, 15))
    [path] = write_stack(cube, tmp_path / "out")
    with rasterio.open(path) as file:
        expected = TRANSFORM @ Affine.translation(4, 3)
        np.testing.assert_allclose(tuple(file.transform), tuple(expected), rtol=1e-14)
        assert (
            file.transform.a == TRANSFORM.a
        )  # steps as the file had them, not as differences of coordinates


def test_bands_by_name_and_number(tmp_path):
    make_folder(tmp_path / "in")
    both = open_stack(tmp_path / "in")
    xr.testing.assert_equal(open_stack(tmp_path / "in", bands="B03"), both.sel(band=["B03"]))
    xr.testing.assert_equal(open_stack(tmp_path / "in", bands=[2, 1]), both.isel(band=[1, 0]))
    for wanted in ("B08", 0, 3, True):
        with pytest.raises(ValueError, match=r"^bands: expected some of \['B02', 'B03'\].*choose"):
            open_stack(tmp_path / "in", bands=wanted)


def test_bands_without_names_are_numbered(tmp_path):
    make_folder(tmp_path / "in", names=())
    cube = open_stack(tmp_path / "in")
    assert cube.band.values.tolist() == [1, 2]
    [path, *_] = write_stack(cube, tmp_path / "out")
    with rasterio.open(path) as file:
        assert file.descriptions == (None, None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("20160608T064632_20160608T070007_T39PVM.tif", "2016-06-08T06:46:32"),  # fastcubo
        ("COPERNICUS_S2_HARMONIZED__20180101.tif", "2018-01-01"),
        ("S2A_MSIL1C_20170105T013442_N0204_R031_T53NMJ_20170105T013443.tif", "2017-01-05T01:34:42"),
        ("T33TWM_20200503T100031_B04_10m.jp2", "2020-05-03T10:00:31"),
        ("LC08_L1TP_123032_20200131_20200205_02_T1_B4.TIF", "2020-01-31"),
        ("LC80010022013164LGN00.tif", "2013-06-13"),
        ("HLS.L30.T10SEG.2020131T184512.v2.0.B04.tif", "2020-05-10T18:45:12"),
        ("S1A_IW_GRDH_1SDV_20200131T052710_20200131T052735_031036_0390A2_5B4F.tif", "2020-01-31T05:27:10"),
        ("ndvi_2020-01-31.tif", "2020-01-31"),
        ("2020-01-31T10:20:30Z.tif", "2020-01-31T10:20:30"),
        ("2020_01_31.tif", "2020-01-31"),
        ("tile_12345678_20200229.tif", "2020-02-29"),  # the first is no date
        ("20210229.tif", None),
        ("20201301.tif", None),
        ("1202001312.tif", None),  # part of a longer number
        ("mosaic.tif", None),
    ],
)
def test_dates_in_names(name, expected):
    found = parse_time(name)
    assert found == (None if expected is None else np.datetime64(expected, "ns"))


@pytest.mark.parametrize("kind", [datetime.datetime, np.datetime64, str])
def test_dates_from_a_function(tmp_path, kind):
    make_folder(tmp_path / "in")
    days = iter(["2020-03-01", "2020-01-01", "2020-02-01"])
    make = datetime.datetime.fromisoformat if kind is datetime.datetime else kind
    cube = open_stack(tmp_path / "in", time=lambda path: make(next(days)))
    assert cube.time.values.astype("M8[M]").astype(str).tolist() == ["2020-01", "2020-02", "2020-03"]
    assert [name[6:8] for name in cube.file.values] == ["15", "25", "05"]  # sorted by time, not by name


BAD = {
    "unreadable": (
        lambda folder, good: (folder / "20200101.tif").write_bytes(b"not a tif"),
        "cannot be read",
    ),
    "truncated": (
        lambda folder, good: (folder / "20200101.tif").write_bytes(good.read_bytes()[:60]),
        "cannot be read",
    ),
    "no date": (
        lambda folder, good: (folder / "mosaic.tif").write_bytes(good.read_bytes()),
        "no date in its name",
    ),
    "duplicate": (
        lambda folder, good: (folder / f"a_{good.name[:15]}.tif").write_bytes(good.read_bytes()),
        "of the same time as 20170105T064632",
    ),
    "other size": (
        lambda folder, good: write_tif(
            folder / "20200101.tif", np.ones((2, 7, 8), "u2"), names=("B02", "B03")
        ),
        r"size \(7, 8\) where most have \(7, 9\)",
    ),
    "other place": (
        lambda folder, good: write_tif(
            folder / "20200101.tif",
            np.ones((2, 7, 9), "u2"),
            names=("B02", "B03"),
            transform=Affine(10, 0, 0, 0, -10, 0),
        ),
        "transform .* where most have",
    ),
    "other crs": (
        lambda folder, good: write_tif(
            folder / "20200101.tif", np.ones((2, 7, 9), "u2"), names=("B02", "B03"), crs="EPSG:32634"
        ),
        r"CRS WGS 84 / UTM zone 34N where most have WGS 84 / UTM zone \d+N",
    ),
    "other dtype": (
        lambda folder, good: write_tif(
            folder / "20200101.tif", np.ones((2, 7, 9), "f4"), names=("B02", "B03")
        ),
        "dtypes .* where most have",
    ),
    "other bands": (
        lambda folder, good: write_tif(
            folder / "20200101.tif", np.ones((2, 7, 9), "u2"), names=("B02", "B04")
        ),
        "band names .* where most have",
    ),
    "empty": (
        lambda folder, good: write_tif(
            folder / "20200101.tif", np.zeros((2, 7, 9), "u2"), names=("B02", "B03")
        ),
        "it is empty",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_raise_or_are_skipped_with_a_list(tmp_path, kind):
    [good, *_] = make_folder(tmp_path / "in")
    expected = open_stack(tmp_path / "in")
    spoil, reason = BAD[kind]
    spoil(tmp_path / "in", good)
    with pytest.raises(ValueError, match=rf"^source: .*1 of 4 that are not: .*{reason}.*errors=\"skip\""):
        open_stack(tmp_path / "in")
    cube = open_stack(tmp_path / "in", errors="skip")
    [note] = cube.attrs.pop("skipped_files")
    [left_out] = [path.name for path in (tmp_path / "in").iterdir() if path.name not in expected.file]
    assert note.startswith(f"{left_out}: ")
    xr.testing.assert_identical(cube, expected)


def test_a_folder_without_use_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^source: expected a folder"):
        open_stack(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(FileNotFoundError, match=r"files like \*\.tif\*, got none among the 1 files"):
        open_stack(tmp_path)
    with pytest.raises(FileNotFoundError, match="an empty list"):
        open_stack([])
    with pytest.raises(FileNotFoundError, match=r"gone\.tif, not there"):
        open_stack([tmp_path / "gone.tif"])
    (tmp_path / "20200101.tif").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"none of 1 .*cannot be read"):
        open_stack(tmp_path, errors="skip")
    with pytest.raises(ValueError, match=r"^errors: "):
        open_stack(tmp_path, errors="ignore")


def test_files_and_patterns(tmp_path):
    paths = make_folder(tmp_path / "in")
    (tmp_path / "in" / "20170105_mask.tif").write_bytes(b"")
    (tmp_path / "in" / ".hidden.tif").write_bytes(b"")
    cube = open_stack(tmp_path / "in", pattern="*T39PVM.tif")
    xr.testing.assert_identical(cube, open_stack(reversed(paths)))
    xr.testing.assert_identical(cube[:1], open_stack(paths[0]))
    assert open_stack(str(tmp_path / "in"), pattern="*t39pvm.TIF").sizes["time"] == 3


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, ["20170105.tif", "20170110T103000.tif", "20170110T120000.tif"]),
        ("{time:%Y-%m-%d}_{number}", ["2017-01-05_0.tif", "2017-01-10_1.tif", "2017-01-10_2.tif"]),
        ("{name}_{number:03d}.TIF", ["reflectance_000.TIF", "reflectance_001.TIF", "reflectance_002.TIF"]),
    ],
)
def test_names_of_files(tmp_path, template, expected):
    cube = make_series(3, 16, bands=1).cube
    cube["time"] = np.array(["2017-01-05", "2017-01-10T10:30", "2017-01-10T12"], "datetime64[ns]")
    paths = write_stack(cube, tmp_path, template=template)
    assert [path.name for path in paths] == expected
    assert {path.name for path in tmp_path.iterdir()} == set(expected)  # nothing else, no leftovers


def test_names_from_the_files_that_were_read(tmp_path):
    paths = make_folder(tmp_path / "in")
    written = write_stack(open_stack(paths), tmp_path / "out", template="{file}_aligned")
    assert [path.name for path in written] == [f"{path.stem}_aligned.tif" for path in paths]
    plain = make_series(2, 16).cube.drop_vars("time")
    assert [path.name for path in write_stack(plain, tmp_path / "plain")] == ["0000.tif", "0001.tif"]


@pytest.mark.parametrize(
    "template", ["{time:%Y}.tif", "same.tif", "{nothing}.tif", "{file}.tif", "a/{number}.tif"]
)
def test_bad_templates_raise_before_anything_is_written(tmp_path, template):
    with pytest.raises(ValueError, match=r"^template: "):
        write_stack(make_series(2, 16).cube, tmp_path / "out", template=template)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("apart", "cure"),
    [
        (0, r'\{number\}, "\{number:04d\}\.tif"$'),
        (3600, r', or the time of day, "\{time:%Y%m%dT%H%M%S\}\.tif"$'),
    ],
)
def test_the_cure_for_names_that_repeat_is_one(tmp_path, apart, cure):
    cube = make_series(3, 16).cube
    cube["time"] = np.datetime64("2017-01-05T10:30", "ns") + np.arange(3) * np.timedelta64(apart, "s")
    template = "{time:%Y%m%d}" if apart else None
    with pytest.raises(ValueError, match=cure) as error:
        write_stack(cube, tmp_path, template=template)
    assert len(write_stack(cube, tmp_path, template=str(error.value).split('"')[-2])) == 3


def test_nothing_is_overwritten_unasked(tmp_path):
    cube = make_series(2, 16).cube
    [first, second] = write_stack(cube, tmp_path)
    second.unlink()
    kept = first.read_bytes()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_stack(cube + 1, tmp_path)
    assert first.read_bytes() == kept
    assert not second.exists()
    write_stack(cube + 1, tmp_path, overwrite=True)
    assert first.read_bytes() != kept


def test_a_failed_file_leaves_nothing(tmp_path):
    cube = make_series(2, 16).cube
    [first, _] = write_stack(cube, tmp_path)
    kept = first.read_bytes()
    with pytest.raises(rasterio.errors.CRSError):
        write_stack(
            cube.assign_coords(spatial_ref=((), 0, {"crs_wkt": "nonsense"})), tmp_path, overwrite=True
        )
    assert first.read_bytes() == kept
    assert len(list(tmp_path.iterdir())) == 2


def test_a_cube_without_band_or_coordinates(tmp_path):
    plain = xr.DataArray(np.arange(2 * 5 * 6, dtype="i2").reshape(2, 5, 6), dims=("time", "y", "x"))
    paths = write_stack(plain, tmp_path)
    for path, expected in zip(paths, plain.values, strict=True):
        found = describe_tif(path)
        assert (found["pixels"], found["crs"]) == (expected.tobytes(), None)
    flags = plain > 3
    [path, _] = write_stack(flags, tmp_path / "bool", driver="GTiff")
    assert describe_tif(path)["pixels"] == flags.values[0].astype("u1").tobytes()


@pytest.mark.parametrize("compression", ["deflate", "lzw", "zstd", "none"])
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_compression_is_lossless(tmp_path, compression, dtype):
    cube = make_series(1, 32, dtype=dtype).cube
    [path] = write_stack(cube, tmp_path, compression=compression)
    with rasterio.open(path) as file:
        np.testing.assert_array_equal(file.read(), cube.values[0])
        found = file.compression
    assert (found.value.lower() if found else "none") == compression


def test_overviews_have_no_classes_of_their_own(tmp_path):
    classes = np.random.default_rng(0).choice(np.array([1, 200], np.uint8), (1, 1, 1100, 1100))
    [path] = write_stack(xr.DataArray(classes, dims=("time", "band", "y", "x")), tmp_path)
    with quiet(), rasterio.open(path) as file:
        assert file.overviews(1)
        assert set(np.unique(file.read(out_shape=(1, 550, 550)))) == {1, 200}


def test_floats_that_were_packed_have_nan_for_nodata(tmp_path):
    cube = make_series(1, 16, dtype="float32", nodata=None).cube
    cube.encoding = {"dtype": "uint16", "_FillValue": 65535, "scale_factor": 1e-4}
    cube[0, :, 0, 0] = np.nan
    [path] = write_stack(cube, tmp_path)
    with rasterio.open(path) as file:
        assert np.isnan(file.nodata)


def test_scales_of_other_bands_raise(tmp_path):
    make_folder(tmp_path / "in", 1)
    cube = open_stack(tmp_path / "in").assign_attrs(scales=(1e-4, 2e-4))  # as rioxarray has them
    with pytest.raises(ValueError, match="scales of 1 bands"):
        write_stack(cube.isel(band=[0]), tmp_path / "out")


@pytest.mark.parametrize("chunks", [0, -1, "all", True])
def test_chunks_that_mean_nothing_raise(tmp_path, chunks):
    make_folder(tmp_path / "in", 1)
    with pytest.raises(ValueError, match="a positive number of frames"):
        open_stack(tmp_path / "in", chunks=chunks)


def test_shifted_georeferences_are_written(tmp_path):
    cube, reference, shift, _ = make_series(3, 64)
    _, report = ta.align(cube, reference)
    corrected = ta.apply(cube, report, mode="shift-coords")
    for path, expected, frame in zip(write_stack(corrected, tmp_path), shift, cube.values, strict=True):
        with rasterio.open(path) as file:
            np.testing.assert_array_equal(file.read(), frame)
            np.testing.assert_allclose(file.transform.c - 499_980, 10 * expected[0], atol=0.3)
            np.testing.assert_allclose(file.transform.f - 5_000_040, -10 * expected[1], atol=0.3)
            assert (file.transform.a, file.transform.e) == (10, -10)


# --- stores ---


@pytest.mark.parametrize("name", ["cube.zarr", "cube.nc"])
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("compute", [False, True])
def test_stores_are_written_in_whole(tmp_path, name, lazy, compute):
    pytest.importorskip("dask")
    pytest.importorskip("zarr" if name.endswith("zarr") else "h5netcdf")
    cube = make_series(4, 16).cube
    path = write_cube(cube.chunk({"time": 2}) if lazy else cube, tmp_path / name, compute=compute)
    if lazy and not compute:
        assert not (tmp_path / name).exists()
        path = path.compute()
    assert path == tmp_path / name
    assert list(tmp_path.iterdir()) == [path]
    options = {"engine": "zarr", "chunks": None} if name.endswith("zarr") else {"engine": "h5netcdf"}
    with xr.open_dataset(path, mask_and_scale=False, **options) as file:
        np.testing.assert_array_equal(file["reflectance"], cube)
        assert file["reflectance"].dtype == cube.dtype
        assert file.spatial_ref.attrs["crs_wkt"] == cube.spatial_ref.attrs["crs_wkt"]
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_cube(cube, path)
    write_cube(cube, path, overwrite=True)
    with pytest.raises(ValueError, match=r"^path: expected a name ending in \.zarr or \.nc"):
        write_cube(cube, tmp_path / "cube.tif")


def test_folders_of_others_are_not_replaced(tmp_path):
    (tmp_path / "cube.zarr").mkdir()
    (tmp_path / "cube.zarr" / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no folder of yours"):
        write_cube(make_series(1, 16).cube, tmp_path / "cube.zarr", overwrite=True)
    assert (tmp_path / "cube.zarr" / "precious.txt").read_text() == "mine"


KILLED = """
import sys, threading, time
from pathlib import Path
import xarray as xr
import dask.array as da
import numpy as np
from torchalign.io import write_cube, write_stack

def slowly(block, half, block_info=None):
    if block_info and block_info[None]["chunk-location"][0] > 1:
        half.touch()
        time.sleep(60)
    return block + 1

def write(writer, kind):
    zeros = da.zeros((6, 1, 16, 16), chunks=(1, -1, -1, -1), dtype="u2")
    data = zeros.map_blocks(slowly, dtype="u2", half=place / f"half.{kind}")
    writer(xr.DataArray(data, dims=("time", "band", "y", "x"), name="cube"), place / f"out.{kind}")

place = Path(sys.argv[1])
threading.Thread(target=write, args=(write_cube, "zarr")).start()
write(write_stack, "tif")
"""


@pytest.mark.skipif(os.name != "posix", reason="kills a process by signal")
def test_killed_half_way_nothing_looks_complete(tmp_path):
    pytest.importorskip("dask")
    path = [str(Path(ta.__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    job = subprocess.Popen(
        [sys.executable, "-c", KILLED, tmp_path],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
    )
    deadline = time.monotonic() + 60
    halves = [tmp_path / "half.zarr", tmp_path / "half.tif"]
    while not all(half.exists() for half in halves) and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    there = [half.exists() for half in halves]
    job.send_signal(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    assert all(there), "it never got half-way"
    assert not (tmp_path / "out.zarr").exists()
    assert any(path.name.endswith(".partial") for path in tmp_path.iterdir())
    # whole files, or none: each opens, and has all its pixels
    complete = [path for path in (tmp_path / "out.tif").iterdir() if not path.name.startswith(".")]
    assert len(complete) < 6
    for path in complete:
        assert bool((open_stack(path, time=lambda path: "2020-01-01") == 1).all())


def test_bands_keep_their_scales_and_names_in_another_order(tmp_path):
    make_folder(tmp_path / "in", 1, scales=(0.1, 0.5), offsets=(0.0, 7.0))
    cube = open_stack(tmp_path / "in")
    [swapped] = write_stack(cube.isel(band=[1, 0]), tmp_path / "swapped")
    [one] = write_stack(cube.sel(band=["B03"]), tmp_path / "one")
    for path, names, scales in ((swapped, ("B03", "B02"), (0.5, 0.1)), (one, ("B03",), (0.5,))):
        found = describe_tif(path)
        assert (found["descriptions"], found["scales"]) == (names, scales)
    make_folder(tmp_path / "partly", 1, names=("", "B03"))
    [partly] = write_stack(open_stack(tmp_path / "partly").isel(band=[1, 0]), tmp_path / "partly_out")
    assert describe_tif(partly)["descriptions"] == ("B03", None)


def test_notes_of_gdal_are_no_dates(tmp_path):
    make_folder(tmp_path, 3)
    for path in list(tmp_path.iterdir()):
        for ending in (".aux.xml", ".ovr", ".msk"):
            (tmp_path / f"{path.name}{ending}").write_text("<PAMDataset/>")
    assert open_stack(tmp_path).sizes["time"] == 3


@pytest.mark.parametrize("chunks", [None, 1])
def test_a_download_that_broke_off_is_named_or_left_out(tmp_path, chunks):
    make_folder(tmp_path, 3, size=(64, 64), names=("B02",))
    bad = sorted(tmp_path.iterdir())[1]
    bad.write_bytes(bad.read_bytes()[: bad.stat().st_size // 2])
    if chunks is None:
        with pytest.raises(ValueError, match=f"1 of 3 that are not: {bad.name}: it cannot be read"):
            open_stack(tmp_path)
        cube = open_stack(tmp_path, errors="skip")
        assert cube.sizes["time"] == 2
        assert bad.name in cube.attrs["skipped_files"][0]
    else:
        # the directory of its pages, at its end, is gone, so that no reading is needed to see it
        with pytest.raises(ValueError, match=bad.name):
            open_stack(tmp_path, chunks=chunks)
        whole = open_stack(tmp_path, chunks=chunks, errors="skip")
        other = sorted(tmp_path.iterdir())[0]
        other.unlink()
        with pytest.raises(OSError, match=other.name):
            whole.compute(scheduler="synchronous")


def test_what_a_function_gives_for_a_date(tmp_path):
    make_folder(tmp_path, 2)
    stem = open_stack(tmp_path, time=lambda path: path.stem[:8])
    assert list(stem.time.dt.strftime("%Y%m%d").values) == ["20170105", "20170115"]
    for wrong in (lambda path: int(path.stem[:8]), lambda path: "nonsense", lambda path: "99990101"):
        with pytest.raises(ValueError, match=r"time\('20170105.*expected a date"):
            open_stack(tmp_path, time=wrong)
    assert parse_time("20200101123456.tif") == np.datetime64("2020-01-01T12:34:56")


@pytest.mark.parametrize("labelled", [True, False])
def test_a_corrected_georeference_goes_with_a_crop(tmp_path, labelled):
    turned = {} if labelled else {"transform": Affine(8.0, 3.0, 5e5, 3.0, -8.0, 5e6)}
    make_folder(tmp_path / "in", 2, size=(32, 40), **turned)
    cube = open_stack(tmp_path / "in")
    warp = np.tile(np.eye(2, 3), (2, 1, 1))
    warp[1, :, 2] = 1.5, -0.5
    shifted = ta.apply(cube, warp, mode="shift-coords")
    if not labelled:
        with pytest.raises(ValueError, match="crop before"):
            write_stack(shifted.isel(x=slice(20, 30)), tmp_path / "crop")
        return
    crop = {"x": slice(20, 30), "y": slice(4, 20)}
    coarse = shifted.coarsen(x=2, y=2).mean().astype(cube.dtype)
    for name, part, step in (("crop", shifted.isel(crop), 1), ("coarse", coarse, 2)):
        of = cube.isel(crop) if name == "crop" else cube.coarsen(x=2, y=2).mean()
        for number, path in enumerate(write_stack(part, tmp_path / name)):
            with rasterio.open(path) as file:
                found = file.transform
            assert (found.a, found.e) == pytest.approx((10 * step, -10 * step))
            corner = (float(of.x[0]) - 5 * step, float(of.y[0]) + 5 * step)
            moved = 10 * warp[number, :, 2]
            assert (found.c, found.f) == pytest.approx((corner[0] + moved[0], corner[1] - moved[1]))
    # pixels that were resampled need no correction any more
    assert "geotransform" not in ta.apply(shifted, warp).coords
    assert "geotransform" not in ta.align(shifted, "first")[0].coords


@pytest.mark.parametrize("name", ["out", "out.zarr", "out.nc"])
def test_a_report_that_waited_is_summed_up(tmp_path, name):
    aligned, report = ta.align(make_series(4, 48).cube.chunk(time=2), "first")
    write = write_stack if name == "out" else write_cube
    _, known = write(aligned, tmp_path / name, report=report)
    assert known.attrs["frames"] == 4
    assert {"status_counts", "shift_median", "ce90"} <= set(known.attrs)


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_attributes_that_a_format_has_not_are_written_as_text(tmp_path, suffix):
    pytest.importorskip("zarr" if suffix == ".zarr" else "h5netcdf")
    attrs = {
        "nested": {"b": 1},
        "none": None,
        "flag": True,
        "mixed": [1, "a"],
        "day": np.datetime64("2020-01-01"),
    }
    cube = xr.DataArray(
        np.ones((2, 4, 4), "uint8"), dims=("time", "y", "x"), name="cube", attrs={**attrs, "plain": [1, 2]}
    )
    path = ta.io.write_cube(cube, tmp_path / f"out{suffix}", attrs=attrs)
    engine = "zarr" if suffix == ".zarr" else "h5netcdf"
    with xr.open_dataset(path, engine=engine) as found:
        for told in (found.attrs, found.cube.attrs):
            assert "2020-01-01" in told["day"]
            assert told["nested"] == ({"b": 1} if suffix == ".zarr" else '{"b": 1}')
        assert list(found.cube.attrs["plain"]) == [1, 2]
    assert cube.attrs["flag"] is True


def test_a_dtype_that_geotiff_has_not(tmp_path):
    cube = xr.DataArray(np.ones((1, 4, 4)), dims=("time", "y", "x")).astype("complex64")
    with pytest.raises(TypeError, match="expected an integer or floating dtype"):
        write_stack(cube, tmp_path / "out")
    with pytest.raises(TypeError, match="expected a dtype that GeoTIFF has, got float"):
        write_stack(cube.real.astype("longdouble"), tmp_path / "out")


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_nodata_of_64_bits_is_kept(dtype, tmp_path):
    values = np.arange(32, dtype=dtype).reshape(2, 4, 4)
    cube = xr.DataArray(
        values, {"time": np.array(["2020-01-01", "2020-01-02"], "M8[ns]")}, ("time", "y", "x")
    )
    write_stack(cube.assign_attrs(_FillValue=7), tmp_path)
    assert open_stack(tmp_path).attrs["_FillValue"] == 7


@pytest.mark.parametrize(
    ("dtype", "nodata", "kept"),
    [
        ("int64", -(10**15), True),
        ("int64", 2**53 + 1, False),
        ("int64", -(10**17), False),
        ("int64", -(2**63), False),
        ("int64", 2**63 - 1, False),
        ("uint64", 2**64 - 1, False),
    ],
)
def test_nodata_that_a_geotiff_cannot_hold_is_none_and_told(dtype, nodata, kept, tmp_path):
    """It was written as another, plausible number: -2**63 as -9."""
    times = {"time": np.array(["2020-01-01"], "M8[ns]")}
    cube = xr.DataArray(np.full((1, 4, 4), 7, dtype), times, ("time", "y", "x"))
    cube[0, 0] = nodata
    cube.attrs["_FillValue"] = np.dtype(dtype).type(nodata)
    with (
        contextlib.nullcontext()
        if kept
        else pytest.warns(UserWarning, match="nodata: expected an integer .*io.write_cube")
    ) as told:
        write_stack(cube, tmp_path / "files")
    assert kept or told[0].filename == __file__
    known = open_stack(tmp_path / "files")
    assert known.attrs.get("_FillValue") == (nodata if kept else None)
    np.testing.assert_array_equal(known.values.ravel(), cube.values.ravel())
    for suffix, engine in ((".nc", "h5netcdf"), (".zarr", "zarr")):
        path = ta.io.write_cube(cube, tmp_path / f"cube{suffix}")
        with xr.open_dataset(path, engine=engine, mask_and_scale=False) as stored:
            assert int(stored.cube.attrs["_FillValue"]) == nodata
