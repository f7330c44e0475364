"""`align` on labelled cubes. A scripted aligner shows what goes in and comes out; PCC shows that it works."""

from __future__ import annotations

import builtins
import datetime
import inspect
import json
import tracemalloc

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import torchalign.cube.reference
import torchalign.cube.run
import torchalign.xr
from torchalign.cascade import Cascade
from torchalign.ecc import ECC
from torchalign.functional.affine import translation_warp
from torchalign.functional.warp import warp
from torchalign.pcc import PCC
from torchalign.types import Alignment, Estimate, Status
from torchalign.xr import align


class Scripted(nn.Module):
    """Moves every frame by one shift (x, y), flags frames that are all NaN, remembers what it saw."""

    def __init__(self, x=1.0, y=0.0, *, fill_value=None, change=None, flag=()):
        super().__init__()
        self.shift, self.fill_value, self.change, self.flag = (x, y), fill_value, change, flag
        self.calls = []

    def forward(self, cube, reference, mask=None, reference_mask=None, *, init=None):
        self.calls.append((cube.clone(), reference.clone(), mask, reference_mask))
        frames = len(cube)
        first = sum(len(call[0]) for call in self.calls[:-1])
        status = torch.where(cube.isnan().flatten(1).all(1), 3, 0)
        for frame in self.flag:
            if first <= frame < first + frames:
                status[frame - first] = Status.NOT_BETTER
        shift = cube.new_tensor(self.shift).expand(frames, 2) * (status == 0)[:, None]
        matrix = translation_warp(shift)
        aligned = warp(cube, matrix, fill_value=self.fill_value, mask=mask)
        if self.change is not None:
            aligned = self.change(aligned)
        number = cube.new_full((frames,), 0.5)
        return Alignment(
            aligned,
            Estimate(
                matrix,
                number,
                number / 2,
                number / 10,
                0.0025 * torch.eye(2).to(cube).expand(frames, 2, 2),
                status,
                0 * status,
            ),
        )

    def seen(self, argument=0):
        return torch.cat([call[argument] for call in self.calls]).numpy()


def make_cube(dtype="float32", frames=4, bands=2, height=12, width=10, low=10, high=200, **options):
    values = np.random.default_rng(7).integers(low, high, (frames, bands, height, width)).astype(dtype)
    coords = {
        "time": np.datetime64("2020-05-01T10:30:00", "ns") + np.arange(frames) * np.timedelta64(5, "D"),
        "band": [f"B{band:02d}" for band in range(2, 2 + bands)],
        "y": 5_000_000.0 - 10 * np.arange(height),
        "x": 500_000.0 + 10 * np.arange(width),
    }
    return xr.DataArray(values, coords, ("time", "band", "y", "x"), **options)


def make_series(frames=5, size=64, dtype="float32", seed=3):
    """Windows of a random blurred scene at whole offsets, so exact shifts: cube, shifts (T, 2) in x, y."""
    rng = np.random.default_rng(seed)
    margin = 3
    scene = rng.random((2, size + 2 * margin, size + 2 * margin))
    scene = sum(np.roll(scene, (i, j), (1, 2)) for i in range(3) for j in range(3)) * 400 + 100
    offsets = rng.integers(-margin, margin + 1, (frames, 2))
    offsets[0] = 0
    windows = [
        scene[:, margin + dy : margin + dy + size, margin + dx : margin + dx + size] for dx, dy in offsets
    ]
    template = make_cube(frames=frames, height=size, width=size)
    return template.copy(data=np.stack(windows)).astype(dtype), offsets


# --- dims ---


NAMES = {
    "time": ("time", "t", "date"),
    "band": ("band", "bands", "channel", "wavelength", "variable"),
    "y": ("y", "lat", "latitude", "northing", "row"),
    "x": ("x", "lon", "longitude", "easting", "col"),
}


@pytest.mark.parametrize(("role", "name"), [(role, name) for role, names in NAMES.items() for name in names])
def test_dims_are_found_by_every_known_name(role, name):
    cube = make_cube()
    expected, _ = align(cube, "first", Scripted(1, 2))
    aligned, report = align(cube.rename({role: name} if role != name else {}), "first", Scripted(1, 2))
    np.testing.assert_array_equal(aligned, expected)
    assert aligned.dims == tuple(name if dim == role else dim for dim in cube.dims)
    assert report.status.dims == (name if role == "time" else "time",)


@pytest.mark.parametrize(
    "order", [("y", "x", "band", "time"), ("band", "x", "time", "y"), ("x", "time", "y", "band")]
)
def test_dims_in_any_order_give_the_same_pixels_in_that_order(order):
    cube = make_cube("uint16")
    expected, expected_report = align(cube, "median", Scripted(1.5, -2), batch_size=3)
    aligned, report = align(cube.transpose(*order), "median", Scripted(1.5, -2), batch_size=3)
    assert aligned.dims == order
    xr.testing.assert_identical(aligned.transpose(*cube.dims), expected)
    xr.testing.assert_equal(report, expected_report)


def test_a_cube_without_band():
    cube = make_cube().sel(band="B03")
    aligned, _ = align(cube, "first", Scripted(2, 1))
    assert aligned.dims == ("time", "y", "x")
    np.testing.assert_array_equal(aligned.values[:, 1:, 2:], cube.values[:, :-1, :-2])
    assert aligned.band.item() == "B03"


def test_dims_given_by_name():
    cube = make_cube()
    odd = cube.rename(time="acquisition", band="polarisation", y="down", x="right")
    names = {"time_dim": "acquisition", "band_dim": "polarisation", "y_dim": "down", "x_dim": "right"}
    aligned, report = align(odd, odd[0], Scripted(1, 2), mask=odd[:, 0] > -1, **names)
    np.testing.assert_array_equal(aligned, align(cube, "first", Scripted(1, 2))[0])
    assert report.shift_x.dims == ("acquisition",)
    both = cube.rename(band="t")  # now "time" and "t" could each be time
    np.testing.assert_array_equal(
        align(both, "first", Scripted(), time_dim="time", band_dim="t")[0].dims, both.dims
    )


@pytest.mark.parametrize(
    ("change", "options", "pattern"),
    [
        (lambda c: c.rename(time="epoch"), {}, r"got .*'epoch'.*time_dim='epoch'"),
        (lambda c: c.rename(y="down"), {}, r"'down'.*y_dim='down'"),
        (lambda c: c.rename(band="polarisation"), {}, r"unknown \['polarisation'\].*band_dim='polarisation'"),
        (lambda c: c.rename(band="t"), {}, r"one time dim.*\['time', 't'\].*time_dim="),
        (lambda c: c.isel(time=0), {}, r"without time.*expand_dims\(\"time\"\)"),
        (lambda c: c.isel(x=0, drop=True), {}, r"without x.*expand_dims"),
        (lambda c: c.expand_dims("tile"), {}, r"'tile'.*isel"),
        (lambda c: c, {"time_dim": "epoch"}, r"time_dim: expected one dim of .* got 'epoch'"),
        (
            lambda c: c,
            {"time_dim": "band", "band_dim": "band"},
            r"time_dim: .* got 'band'; name each dim once",
        ),
    ],
)
def test_dims_that_cannot_be_told_raise_with_a_cure(change, options, pattern):
    with pytest.raises(ValueError, match=pattern):
        align(change(make_cube()), "first", Scripted(), **options)


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # rioxarray's use of affine
def test_everything_about_the_cube_is_kept():
    pytest.importorskip("rioxarray")
    cube = make_cube("int16", name="reflectance", attrs={"units": "1", "history": ["a"]})
    cube = cube.rio.write_crs("EPSG:32633").rio.write_transform()
    cube = cube.assign_coords(
        platform=("time", list("abcd")), tile="33TVM", sun=(("time", "band"), np.ones((4, 2)))
    )
    cube.encoding = {"dtype": "int16", "zlib": True, "_FillValue": -1, "grid_mapping": "spatial_ref"}
    before = cube.copy(deep=True)
    aligned, _ = align(cube, "first", Scripted())
    xr.testing.assert_identical(aligned, cube.copy(data=aligned.values))
    assert aligned.encoding == cube.encoding == before.encoding
    assert aligned.dtype == cube.dtype
    assert aligned.rio.crs == cube.rio.crs
    assert aligned.rio.transform() == cube.rio.transform()
    xr.testing.assert_identical(cube, before)
    assert not np.shares_memory(aligned.values, cube.values)


# --- numbers ---


@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", ">i2", ">u2"]
)
def test_integers_are_rounded(dtype):
    cube = make_cube(dtype, high=120)
    aligned, _ = align(cube, "first", Scripted(0.25, 0))
    exact = 0.75 * cube.values[..., 1:].astype(float) + 0.25 * cube.values[..., :-1].astype(float)
    assert aligned.dtype == cube.dtype
    np.testing.assert_array_equal(aligned.values[..., 1:], np.rint(exact))


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"])
def test_integers_are_clamped_and_never_wrap(dtype):
    limits, cube = np.iinfo(dtype), make_cube(dtype, high=120)
    for sign, expected in ((1, limits.max), (-1, limits.min)):
        aligned, _ = align(cube, "first", Scripted(change=lambda values, sign=sign: values + sign * 1e20))
        error = np.abs(aligned.values.astype(float) - float(expected))
        assert (error <= 1e-6 * float(limits.max)).all()
        assert ((aligned.values > 100) if sign > 0 else (aligned.values < 10)).all()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4", "longdouble"])
def test_floats_keep_their_dtype(dtype):
    cube = make_cube(dtype)
    aligner = Scripted(1, 0)
    aligned, _ = align(cube, "first", aligner)
    assert aligned.dtype == cube.dtype
    assert aligner.seen().dtype == (np.float64 if cube.dtype.itemsize > 4 else np.float32)
    np.testing.assert_array_equal(aligned.values[..., 1:], cube.values[..., :-1])


@pytest.mark.parametrize(
    ("value", "nodata", "compute"),
    [(2**24, None, np.float32), (2**24 + 1, None, np.float64), (-(2**24) - 1, None, np.float64),
     (2**31 - 1, 2**31 - 1, np.float32), (-(2**31), -(2**31), np.float32)],
)  # fmt: skip
def test_large_integers_are_computed_in_float64(value, nodata, compute):
    cube = make_cube("int32")
    cube[2, 1, 3, 4] = value
    if nodata is not None:
        cube.attrs["_FillValue"] = nodata
    aligner = Scripted(1, 0)
    aligned, _ = align(cube, "first", aligner, batch_size=1)
    assert aligner.seen().dtype == compute
    np.testing.assert_array_equal(aligned.values[..., 1:], cube.values[..., :-1])


@pytest.mark.parametrize("dtype", ["uint8", "int64", "uint64", "float32", "longdouble"])
def test_frames_that_are_not_aligned_come_back_bit_for_bit(dtype):
    cube = make_cube(dtype)
    if cube.dtype.itemsize > 4:
        cube[1, 0, 0, 0] = np.array(2**62 + 1, dtype)  # no float64 holds it
    if cube.dtype.kind == "f":
        cube[1, 0, 1, :3] = np.array([np.nan, np.inf, -0.0], dtype)
    aligned, report = align(cube, "first", Scripted(2, 1, flag=[1, 3], change=lambda v: v * 0 + 50))
    assert report.status.values.tolist() == [0, 5, 0, 5]
    assert aligned.values[[1, 3]].tobytes() == cube.values[[1, 3]].tobytes()
    assert (aligned.values[[0, 2]] == 50).all()


@pytest.mark.parametrize(
    ("datacube", "pattern"),
    [
        (
            np.zeros((2, 1, 4, 4), "float32"),
            r"xarray.DataArray, got ndarray; align tensors with aligner\(cube, ref",
        ),
        (torch.zeros(2, 1, 4, 4), r"got Tensor; align tensors with aligner"),
        (make_cube("bool", low=0, high=2), r"integer or floating dtype, got bool; convert it with .astype"),
        (make_cube("complex64"), r"got complex64"),
        (make_cube().astype("datetime64[ns]"), r"got datetime64"),
    ],
)
def test_what_is_no_cube_of_numbers_raises(datacube, pattern):
    with pytest.raises(TypeError, match="datacube: .*" + pattern):
        align(datacube, "first", Scripted())


# --- nodata ---


def declare(cube, how, value):
    if how in ("_FillValue", "missing_value", "nodata"):
        return cube.assign_attrs({how: value})
    if how == "encoding":
        cube.encoding["_FillValue"] = value
        return cube
    pytest.importorskip("rioxarray")
    return getattr(cube.rio, how)(value)


@pytest.mark.parametrize(
    "how", ["_FillValue", "missing_value", "nodata", "encoding", "set_nodata", "write_nodata"]
)
@pytest.mark.parametrize(
    ("dtype", "value"),
    [("uint8", 0), ("uint8", 255), ("int16", -9999), ("int32", 2**31 - 1), ("float32", -9999.0)],
)
def test_nodata_is_unseen_and_stays(how, dtype, value, monkeypatch):
    if not how.startswith(("set", "write")):  # rioxarray, once imported, knows the attrs too
        monkeypatch.delattr(xr.DataArray, "rio", raising=False)
    cube = make_cube(dtype)
    hole = np.random.default_rng(1).random(cube.shape) < 0.2
    cube = declare(cube.copy(data=np.where(hole, np.array(value, dtype), cube.values)), how, value)
    aligner = Scripted(3, 0)
    aligned, _ = align(cube, "median", aligner)
    np.testing.assert_array_equal(np.isnan(aligner.seen()), hole)
    np.testing.assert_array_equal(aligned.values[..., 3:], cube.values[..., :-3])
    half, _ = align(cube, "median", Scripted(0.5, 0.5))  # nothing of the nodata value in the neighbours
    values = half.values[half.values != value]
    assert values.min() >= 10
    assert values.max() <= 200
    assert 0.1 < (half.values == value).mean() < 0.3


@pytest.mark.parametrize(
    ("nodata", "value", "expected"),
    [(0, 0.3, 1), (0, -5.0, 1), (255, 254.8, 254), (255, 300, 254), (100, 100.2, 101)],
)
def test_valid_pixels_do_not_become_nodata(nodata, value, expected):
    cube = make_cube("uint8", high=99).assign_attrs(_FillValue=nodata)
    aligned, _ = align(cube, "first", Scripted(change=lambda values: torch.full_like(values, value)))
    assert (aligned.values == expected).all()


def test_a_fill_value_may_be_the_nodata_value():
    cube = make_cube("uint8").assign_attrs(_FillValue=0)
    aligned, _ = align(cube, "first", Scripted(2, 0, fill_value=0))
    assert (aligned.values[..., :2] == 0).all()
    aligned, _ = align(cube, "first", Scripted(2, 0, fill_value=float("nan")))
    assert (aligned.values[..., :2] == 0).all()


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_pixels_from_outside_are_the_border_or_the_fill_value_and_nodata_stays(dtype):
    cube = make_cube(dtype).assign_attrs(_FillValue=0)
    cube[:, :, 4:6, 3:6] = 0
    border, _ = align(cube, "first", Scripted(2, 0))
    np.testing.assert_array_equal(border.values[..., :2], np.repeat(cube.values[..., :1], 2, -1))
    filled, _ = align(cube, "first", Scripted(2, 0, fill_value=7))
    assert (filled.values[..., :2] == 7).all()
    np.testing.assert_array_equal(filled.values[..., 2:], cube.values[..., :-2])


def test_nan_declared_beside_a_number():
    cube = make_cube().assign_attrs(_FillValue=np.nan, missing_value=-9999.0)
    cube[:, :, 2:4, 2:4] = -9999
    aligned, _ = align(cube, "first", Scripted(1, 0))
    np.testing.assert_array_equal(aligned.values[..., 1:], cube.values[..., :-1])


def test_nan_stays_nan_and_mixes_with_no_nodata_of_other_bands():
    cube = make_cube().assign_attrs(_FillValue=-9999.0)
    cube[:, 0, 2:4, 2:4] = np.nan
    cube[:, 1, 6:8, 6:8] = -9999
    for fill_value in (None, 7.0):
        aligned, _ = align(cube, "first", Scripted(1, 0, fill_value=fill_value))
        np.testing.assert_array_equal(aligned.values[..., 1:], cube.values[..., :-1])


def test_the_fill_value_of_packed_integers_is_not_nodata_of_the_decoded_floats():
    cube = make_cube()
    cube[0, 0, 0, 0] = 0
    cube.encoding = {"_FillValue": 0, "scale_factor": 0.1, "add_offset": -5.0, "dtype": "uint16"}
    aligner = Scripted()
    align(cube, "first", aligner)
    assert not np.isnan(aligner.seen()).any()


def written_and_read(cube):
    """What a file would give back; xarray packs and unpacks, without the disk."""
    with np.errstate(invalid="raise"):  # a NaN or an overflow cast to an integer
        return xr.conventions.decode_cf_variable("cube", xr.conventions.encode_cf_variable(cube.variable))


PACKED = {"dtype": "uint16", "scale_factor": 1e-4, "_FillValue": 65535}


def test_packed_floats_do_not_wrap_when_written():
    """The overshoot of bicubic interpolation beside the ends of the range."""
    cube, _ = make_series()
    cube[2:] = (cube.values + np.roll(cube.values, 1, -1))[2:] / 2  # by half a pixel
    cube = xr.where(cube > cube.median(), np.float32(0.9), np.float32(1e-4)).transpose(*cube.dims)
    for scale, low, high in ((1e-4, 0.0, 6.5534), (1e-4 / 7, 0.0, 6.5534 / 7)):
        cube.encoding = PACKED | {"scale_factor": scale}
        aligned, report = align(cube, "first", PCC(interpolation="bicubic"))
        loose, _ = align(cube.drop_encoding(), "first", PCC(interpolation="bicubic"))
        assert (report.status == Status.OK).sum() >= 2
        assert loose.min() < -0.01
        np.testing.assert_array_equal(aligned, loose.clip(np.float32(low), np.float32(high)))
        assert np.abs(written_and_read(aligned).values - aligned.values).max() < 0.51 * scale
    assert loose.max() > high


@pytest.mark.filterwarnings("ignore:saving variable")  # without a fill value
@pytest.mark.parametrize("dtype", ["float32", "float64", ">f4"])
@pytest.mark.parametrize(
    ("encoding", "low", "high"),
    [
        (PACKED, 0, 6.5534),
        (PACKED | {"_FillValue": 0}, 1e-4, 6.5535),
        (PACKED | {"add_offset": -1.0}, -1, 5.5534),
        (PACKED | {"scale_factor": -1e-4}, -6.5534, 0),
        (PACKED | {"dtype": np.dtype("int16"), "_FillValue": -32768}, -3.2767, 3.2767),
        (PACKED | {"dtype": "int16", "_Unsigned": "true", "_FillValue": -1}, 0, 6.5534),
        ({"dtype": "uint8", "_FillValue": 255}, 0, 254),
        ({"dtype": "uint8"}, 0, 255),
        ({"dtype": "int32", "scale_factor": 1e-4, "_FillValue": -(2**31)}, -214748.3647, 214748.3647),
        ({"dtype": "int32", "scale_factor": 1e-4, "add_offset": -214748.3647}, -429496.7295, 0),
    ],
)  # fmt: skip
def test_packed_floats_are_clamped_to_what_the_integers_hold(dtype, encoding, low, high):
    cube = make_cube(dtype)
    cube = cube.copy(data=(cube.values / 200 * (high - low) + low).astype(dtype))
    cube.encoding = dict(encoding)
    rounding = 8 * float(np.finfo(dtype).eps) * max(-low, high)
    tolerance = max(0.51 * abs(encoding.get("scale_factor", 1)), rounding)
    for far, expected in ((-1e9, low), (1e9, high)):
        aligned, _ = align(cube, "first", Scripted(change=lambda values, far=far: values * 0 + far))
        np.testing.assert_allclose(aligned.astype(float), expected, rtol=0, atol=max(rounding, 1e-6))
        np.testing.assert_allclose(written_and_read(aligned).values, aligned.values, rtol=0, atol=tolerance)


def test_packed_floats_do_not_become_the_fill_value_and_nan_stays():
    cube = make_cube()
    cube[:, 0, 2:4, 2:4] = np.nan
    cube.encoding = {"dtype": "int16", "scale_factor": 0.5, "add_offset": 1.0, "_FillValue": 100}
    assert np.isnan(written_and_read(cube.copy(data=np.full_like(cube, 51.1)))).all()
    aligned, _ = align(cube, "first", Scripted(1, 0, change=lambda values: values * 0 + 51.1))
    np.testing.assert_array_equal(np.isnan(aligned.values[..., 1:]), np.isnan(cube.values[..., :-1]))
    assert np.nanmin(aligned) == np.nanmax(aligned) == 51.5
    np.testing.assert_array_equal(written_and_read(aligned), aligned)


def test_a_fill_value_that_the_packed_integers_cannot_hold_raises():
    cube = make_cube()
    cube.encoding = dict(PACKED)
    with pytest.raises(ValueError, match=r"aligner.fill_value: .*packed uint16 holds, 0.0 … 6.55.*drop_enc"):
        align(cube, "first", Scripted(fill_value=-1.0))
    align(cube, "first", Scripted(fill_value=float("nan")))
    align(cube.drop_encoding(), "first", Scripted(fill_value=-1.0))


def test_an_encoding_that_packs_nothing_changes_nothing():
    cube = make_cube()
    expected, _ = align(cube, "first", Scripted(change=lambda values: values - 500))
    assert expected.max() < 0
    for encoding in (
        {"dtype": "float32"},
        {"zlib": True},
        {"dtype": None},
        {"dtype": "nonsense"},
        {"dtype": str},
    ):
        cube.encoding = encoding
        aligned, _ = align(cube, "first", Scripted(change=lambda values: values - 500))
        np.testing.assert_array_equal(aligned, expected)


def test_a_nodata_value_that_the_dtype_cannot_hold_is_ignored():
    pytest.importorskip("rioxarray")
    cube = make_cube("uint8", low=0).assign_attrs(
        _FillValue=-9999, nodata="none", missing_value=[np.nan, 0.5]
    )
    cube[0, 0, 0] = [0, 1, 255, 241, 0, 1, 255, 241, 0, 1]  # what a cast could make of these
    aligner = Scripted()
    align(cube, "first", aligner)
    assert not np.isnan(aligner.seen()).any()


def test_frames_of_nodata_alone_are_flagged_and_kept():
    cube = make_cube("int16").assign_attrs(_FillValue=-1)
    cube[2] = -1
    aligned, report = align(cube, "median", PCC())
    assert report.status.values[2] == Status.NO_TEXTURE
    np.testing.assert_array_equal(aligned[2], cube[2])


@pytest.mark.parametrize("fill_value", [-1, 256, float("nan"), float("inf")])
def test_a_fill_value_that_the_dtype_cannot_hold_raises(fill_value):
    with pytest.raises(ValueError, match=r"aligner.fill_value: expected what uint8 holds, 0 … 255.*got"):
        align(make_cube("uint8"), "first", Scripted(fill_value=fill_value))


# --- masks ---


@pytest.mark.parametrize(
    "dims", [("time", "y", "x"), ("x", "time", "y"), ("y", "x"), ("time",), ("x", "time")]
)
def test_masks_are_matched_by_dims(dims):
    cube = make_cube()
    whole = cube.isel(band=0, drop=True) > 100
    mask = whole.isel({dim: 0 for dim in whole.dims if dim not in dims}, drop=True).transpose(*dims)
    aligner = Scripted()
    align(cube, "first", aligner, mask=mask, reference_mask=mask, batch_size=3)
    expected = mask.broadcast_like(whole).transpose("time", "y", "x").values
    for call, part in zip(aligner.calls, (slice(0, 3), slice(3, 4)), strict=True):
        for seen in call[2:]:
            assert seen.dtype == torch.bool
            np.testing.assert_array_equal(np.broadcast_to(seen, expected[part].shape), expected[part])


def test_masks_as_arrays_and_tensors():
    cube = make_cube()
    mask = cube.values[:, 0] > 100
    by_frame = mask.any((1, 2), keepdims=True)
    pairs = [(mask, mask), (torch.from_numpy(mask), mask), (mask[0], mask[:1]), (mask[:1], mask[:1])]
    for given, expected in [*pairs, (by_frame, by_frame)]:
        aligner = Scripted()
        align(cube, "first", aligner, mask=given, batch_size=3)
        seen = np.concatenate([np.broadcast_to(call[2], (len(call[0]), 12, 10)) for call in aligner.calls])
        np.testing.assert_array_equal(seen, np.broadcast_to(expected, mask.shape))


def test_a_mask_with_one_band_is_a_mask():
    cube = make_cube()
    aligner = Scripted()
    align(cube, "first", aligner, mask=cube.isel(band=[1]) > 100)
    np.testing.assert_array_equal(aligner.seen(2), cube.values[:, 1] > 100)


@pytest.mark.parametrize("name", ["mask", "reference_mask"])
@pytest.mark.parametrize(
    ("make", "error", "pattern"),
    [
        (lambda c: (c[:, 0] > 9).astype("uint8"), TypeError, r"usable, got uint8.*`mask == 0`.*astype"),
        (lambda c: (c[:, 0] > 9).values.astype(int), TypeError, r"got int64.*`mask == 0`"),
        (lambda c: torch.ones(4, 12, 10), TypeError, r"got float32"),
        (lambda c: "clouds", TypeError, r"a DataArray, an array or a tensor, got str"),
        (lambda c: [[True]], TypeError, r"got list; wrap it with numpy.asarray"),
        (lambda c: c > 9, ValueError, r"one mask for all bands.*all\('band'\)"),
        (lambda c: (c[:, 0] > 9).assign_coords(x=c.x + 5), ValueError, r"'x'.*500000.*reindex_like"),
        (lambda c: (c[:, 0] > 9)[:, ::-1], ValueError, r"the cube's 'y'"),
        (lambda c: (c[:, 0] > 9)[::-1], ValueError, r"the cube's 'time'"),
        (lambda c: (c[:, 0] > 9)[:3], ValueError, r"the cube's 'time', 4 labels.*got 3 labels.*\.sel"),
        (lambda c: (c[:, 0] > 9)[..., :5], ValueError, r"the cube's 'x'"),
        (lambda c: (c[:, 0] > 9).rename(x="u"), ValueError, r"dims .*got .*'u'.*rename"),
        (lambda c: np.ones(10, bool), ValueError, r"2 to 3 axes.*got shape \(10,\)"),
        (lambda c: np.ones((4, 2, 12, 10), bool), ValueError, r"2 to 3 axes.*got shape \(4, 2, 12, 10\)"),
        (lambda c: np.ones((3, 12, 10), bool), ValueError, r"the cube's 'time'.*got 3 without labels"),
    ],
)  # fmt: skip
def test_bad_masks_raise_with_a_cure(name, make, error, pattern):
    cube = make_cube()
    with pytest.raises(error, match=f"^{name}: .*{pattern}"):
        align(cube, "first", Scripted(), **{name: make(cube)})


def test_coordinates_that_differ_by_rounding_are_the_same():
    cube = make_cube()
    mask = (cube[:, 0] > 100).assign_coords(x=cube.x + 1e-4)
    align(cube, "first", Scripted(), mask=mask)
    with pytest.raises(ValueError, match="the cube's 'x'"):
        align(cube, "first", Scripted(), mask=mask.assign_coords(x=cube.x + 0.1))


# --- references ---


@pytest.mark.parametrize("word", ["median", "mean"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int16"])
@pytest.mark.parametrize("frames", [1, 4, 5])
@pytest.mark.parametrize("block", [1, 2000, 2**27])
def test_references_over_time_are_masked(word, dtype, frames, block, monkeypatch):
    for name in ("_REFERENCE_BYTES", "_DECODE_BYTES", "_SORT_BYTES"):
        monkeypatch.setattr(torchalign.cube.reference, name, block)
    cube = make_cube(dtype, frames=frames).assign_attrs(_FillValue=-5)
    rng = np.random.default_rng(2)
    hidden = rng.random(cube.shape) < 0.2
    cube = cube.copy(data=np.where(hidden, np.array(-5, dtype), cube.values))
    if cube.dtype.kind == "f":
        spoilt = rng.random(cube.shape) < 0.1
        cube = cube.copy(
            data=np.where(spoilt, rng.choice([np.nan, np.inf, -np.inf], cube.shape), cube.values).astype(
                dtype
            )
        )
        hidden |= spoilt
    mask = rng.random((frames, 12, 10)) < 0.8
    mask[:, 0, 0] = False  # never usable
    aligner = Scripted()
    align(cube.transpose("y", "time", "x", "band"), word, aligner, mask=mask)
    values = np.ma.masked_array(cube.values.astype(float), hidden | ~mask[:, None])
    expected = (np.ma.median if word == "median" else np.ma.mean)(values, 0).filled(np.nan)
    assert np.isnan(expected[:, 0, 0]).all()
    np.testing.assert_allclose(aligner.calls[0][1], expected, rtol=1e-6)


def test_the_reference_first_is_seen_through_the_mask_and_nodata():
    cube = make_cube("int16").assign_attrs(nodata=-1)
    cube[0, 1, 4, 4] = -1
    mask = cube.values[:, 0] > 60
    aligner = Scripted()
    align(cube, "first", aligner, mask=mask, batch_size=2)
    expected = np.where(mask[0] & (cube.values[0] != -1), cube.values[0].astype("float32"), np.nan)
    for call in aligner.calls:
        np.testing.assert_array_equal(call[1], expected)


@pytest.mark.parametrize(
    "label",
    ["2020-05-06", "2020-05-06T10:30", "2020-05-06T10:30:00", datetime.date(2020, 5, 6),
     np.datetime64("2020-05-06"), np.datetime64("2020-05-06T10:30:00", "ns"),
     datetime.datetime(2020, 5, 6, 10, 30), make_cube().time[1]],
)  # fmt: skip
def test_a_reference_by_time_label(label):
    cube = make_cube()
    aligner = Scripted()
    align(cube, label, aligner)
    np.testing.assert_array_equal(aligner.calls[0][1], cube.values[1])


def test_a_reference_by_the_label_of_other_time_coordinates():
    cube = make_cube().assign_coords(time=[2017, 2018, 2019, 2020])
    aligner = Scripted()
    align(cube, 2019, aligner)
    align(cube.assign_coords(time=list("abcd")), "d", aligner)
    for call, frame in zip(aligner.calls, (2, 3), strict=True):
        np.testing.assert_array_equal(call[1], cube.values[frame])


@pytest.mark.parametrize(
    ("label", "count"),
    [("2020-05", 4), ("2020-05-07", 0), ("2020-05-06T10:31", 0), ("cloudiest", 0),
     (np.datetime64("2020-05-06T11", "h"), 0), (datetime.datetime(2020, 5, 6), 0), (3, 0), ("", 0)],
)  # fmt: skip
def test_a_label_that_is_not_that_of_one_frame_raises(label, count):
    with pytest.raises(
        ValueError, match=rf"^reference: .*'median', 'mean', 'first'.*found {count} times among 4.*isel"
    ):
        align(make_cube(), label, Scripted())


def test_a_label_that_several_frames_share_or_without_labels_raises():
    cube = make_cube().assign_coords(time=[1, 2, 2, 3])
    with pytest.raises(
        ValueError, match=r"found 2 times among 4 .*; pass one of them, datacube\.isel\(time=1\)$"
    ):
        align(cube, 2, Scripted())
    align(cube, cube.isel(time=1), Scripted())
    with pytest.raises(ValueError, match="without labels"):
        align(cube.drop_vars("time"), 2, Scripted())


def test_references_as_data_arrays():
    cube = make_cube("uint8")
    frame = cube[2]
    per_frame = cube + np.uint8(1)
    pairs = [
        (frame, frame),
        (frame.transpose("x", "band", "y"), frame),
        (frame.rename(y="row", x="col", band="channel"), frame),
        (cube[[2]], frame),  # a time dim of one entry is one reference, of whatever date
        (frame.astype("float64"), frame),
        (frame[[1, 0]], frame),  # bands by label
        (xr.concat([frame, frame[:1].assign_coords(band=["B99"])], "band"), frame),
        (frame.drop_vars(["band", "x", "y"]), frame),
        (frame[1].drop_vars("band"), frame[[1, 1]]),  # one picture for every band
    ]
    for given, expected in pairs:
        aligner = Scripted()
        align(cube, given, aligner, batch_size=3)
        for call in aligner.calls:
            assert call[1].dtype == torch.float32
            np.testing.assert_array_equal(call[1], expected)
    for given in (
        per_frame,
        per_frame.transpose("x", "band", "time", "y"),
        per_frame.values,
        torch.from_numpy(per_frame.values),
    ):
        aligner = Scripted()
        align(cube, given, aligner, batch_size=3)
        np.testing.assert_array_equal(aligner.seen(1), per_frame)
    aligner = Scripted()
    align(cube, per_frame[:, 1].drop_vars("band"), aligner, batch_size=3)
    np.testing.assert_array_equal(aligner.seen(1), per_frame[:, [1, 1]])
    for given in (frame.values, torch.from_numpy(frame.values), torch.from_numpy(frame.values).bfloat16()):
        aligner = Scripted()
        align(cube, given, aligner)
        np.testing.assert_array_equal(aligner.calls[0][1], frame)


def test_references_of_a_cube_without_band():
    cube = make_cube(bands=1)[:, 0]
    for given in (cube[1], cube[1].values, cube[[1]].values, cube[1].expand_dims("band")):
        aligner = Scripted()
        align(cube, given, aligner)
        np.testing.assert_array_equal(aligner.calls[0][1], cube.values[[1]])
    aligner = Scripted()
    align(cube, cube.values, aligner)
    np.testing.assert_array_equal(aligner.seen(1), cube.values[:, None])


def test_nodata_of_a_reference():
    cube = make_cube("uint8").assign_attrs(_FillValue=0)
    frame = cube[1].copy()
    frame[0, 3, 3] = 0
    own = frame.astype("float32").assign_attrs(_FillValue=77.0)
    own[1, 5, 5] = 77
    for given, holes in ((frame, [(0, 3, 3)]), (frame.values, [(0, 3, 3)]), (own, [(1, 5, 5)])):
        aligner = Scripted()
        align(cube, given, aligner)
        seen = np.argwhere(np.isnan(aligner.calls[0][1].numpy()))
        assert [tuple(hole) for hole in seen] == holes + [
            tuple(hole) for hole in np.argwhere(np.asarray(given) == 77) if given is not own
        ]


@pytest.mark.parametrize(
    ("make", "error", "pattern"),
    [
        (
            lambda c: c[0].assign_coords(x=c.x + 5),
            ValueError,
            r"the cube's 'x'.*got 10 labels.*reproject_match",
        ),
        (lambda c: c[0, :, ::-1], ValueError, r"the cube's 'y'"),
        (lambda c: c[0, :, :6], ValueError, r"the cube's 'y'.*got 6"),
        (lambda c: c[:3], ValueError, r"the cube's 'time'"),
        (lambda c: c[::-1], ValueError, r"the cube's 'time'"),
        (
            lambda c: c[0, :1],
            ValueError,
            r"the bands of 2 labels \(B02, B03\), got 1 labels \(B02\).*isel\(band=0\)",
        ),
        (lambda c: c[0].assign_coords(band=["B02", "B08"]), ValueError, r"the bands"),
        (lambda c: c[0].drop_vars("band")[[0, 1, 1]], ValueError, r"expected 2 bands, got 3"),
        (lambda c: c[0, :, 0], ValueError, r"the dims .*got \('band', 'x'\).*rename"),
        (lambda c: c[0].expand_dims("tile"), ValueError, r"'tile'"),
        (lambda c: c.values[0, :, :, :5], ValueError, r"the cube's 'x'"),
        (lambda c: c.values[0, :1], ValueError, r"expected 2 bands, got 1 without labels"),
        (
            lambda c: c.values[0, 0, 0],
            ValueError,
            r"2 to 4 axes, the last of \(time, band, y, x\), got shape",
        ),
        (lambda c: c[0] > 9, TypeError, r"an integer or floating dtype, got bool"),
        (lambda c: None, TypeError, r"'median', .* or a time label, got NoneType"),
        (lambda c: True, TypeError, r"got bool"),
        (lambda c: [1, 2], TypeError, r"got list; wrap it with numpy.asarray"),
        (lambda c: np.median, TypeError, rf"or a time label, got {type(np.median).__name__}; wrap it"),
    ],
)
def test_bad_references_raise_with_a_cure(make, error, pattern):
    cube = make_cube()
    with pytest.raises(error, match=f"^reference: .*(?:{pattern})"):
        align(cube, make(cube), Scripted())


# --- aligner, device, batches, progress ---


def test_options_are_keyword_only_and_start_as_designed():
    parameters = inspect.signature(align).parameters
    assert list(parameters)[:3] == ["datacube", "reference", "aligner"]
    assert parameters["reference"].default == "median"
    assert parameters["aligner"].default == "auto"
    assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[3:])


@pytest.mark.parametrize(
    ("name", "make"), [("auto", lambda: Cascade(PCC(), ECC())), ("pcc", PCC), ("ecc", ECC)]
)
def test_aligners_by_name(name, make):
    cube, _ = make_series()
    aligned, report = align(cube, "first", name)
    expected, _ = align(cube, "first", make())
    xr.testing.assert_identical(aligned, expected)
    assert report.attrs["aligner"] == repr(make())


@pytest.mark.parametrize(
    ("aligner", "error", "pattern"),
    [
        ("orb", ValueError, r"in this release one of 'auto', 'cross', 'pcc', .*got 'orb'"),
        ("sift", ValueError, r"got 'sift'"),
        ("PCC ", ValueError, r"got 'PCC '"),
        (PCC, TypeError, r"make an instance"),
        (None, TypeError, r"got None"),
    ],
)
def test_bad_aligners_raise(aligner, error, pattern):
    with pytest.raises(error, match=f"^aligner: .*{pattern}"):
        align(make_cube(), "first", aligner)


@pytest.mark.parametrize("device", ["warp drive", 3.5, "cuda:99"])
def test_bad_devices_raise(device):
    with pytest.raises(ValueError, match=r"^device: expected a torch device of this machine, got"):
        align(make_cube(), "first", Scripted(), device=device)


@pytest.mark.parametrize(
    ("size", "error"),
    [(0, ValueError), (-1, ValueError), (2.0, TypeError), ("2", TypeError), (True, TypeError)],
)
def test_bad_batch_sizes_raise(size, error):
    with pytest.raises(error, match=r"^batch_size: expected a whole number from 1 to 2147483647, got"):
        align(make_cube(), "first", Scripted(), batch_size=size)


def test_the_default_device(monkeypatch):
    aligner = Scripted()
    align(make_cube(), "first", aligner)
    assert aligner.calls[0][0].device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    empty = torch.empty

    def empty_on_meta(*size, device, **options):
        return empty(*size, device="meta" if device == "cuda" else device, **options)

    monkeypatch.setattr(torch, "empty", empty_on_meta)
    assert torchalign.cube.run.find_device(None, aligner).type == "meta"  # what stands for CUDA here
    aligner.register_buffer("table", torch.zeros(1, device="meta"))
    assert torchalign.cube.run.find_device(None, aligner).type == "meta"
    assert torchalign.cube.run.find_device("cpu", aligner).type == "cpu"


def test_the_aligner_is_not_moved():
    aligner = nn.Linear(2, 2, device="meta")
    moved = torchalign.cube.run.place_module(aligner.to_empty(device="cpu"), torch.device("meta"))
    assert moved.weight.device.type == "meta"
    assert aligner.weight.device.type == "cpu"
    assert torchalign.cube.run.place_module(aligner, torch.device("cpu")) is aligner


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_the_cpu():
    cube, _ = make_series(dtype="uint16")
    cube.attrs["_FillValue"] = 0
    cube[2, :, :9, :9] = 0
    on_cpu, expected = align(cube, "median", PCC(), device="cpu")
    on_cuda, report = align(cube, "median", PCC(), device="cuda", batch_size=2)
    np.testing.assert_allclose(report.warp, expected.warp, atol=1e-3)
    assert np.abs(on_cuda.values.astype(int) - on_cpu.values.astype(int)).max() <= 2


@pytest.mark.parametrize(
    ("reference", "dtype"),
    [
        ("median", "uint16"),
        ("median", "float64"),
        ("mean", "float32"),
        ("first", "float64"),
        ("per frame", "uint16"),
        ("per frame", "float32"),
    ],
)
def test_batches_of_any_size_give_the_same_result_to_rounding(reference, dtype):
    """Sums over another batch are taken in another order; in float64 nothing else differs either."""
    cube, _ = make_series(frames=7, dtype=dtype)
    mask = np.random.default_rng(0).random((7, 64, 64)) < 0.9
    reference = cube[[0] * 7].assign_coords(time=cube.time) if reference == "per frame" else reference
    expected, expected_report = align(cube, reference, PCC(), mask=mask, batch_size=7)
    for size in (1, np.int64(3), 100):
        aligned, report = align(cube, reference, PCC(), mask=mask, batch_size=size)
        single = dtype != "float64"
        np.testing.assert_allclose(report.warp, expected_report.warp, rtol=0, atol=1e-6 if single else 1e-14)
        np.testing.assert_array_equal(report.status, expected_report.status)
        if dtype == "uint16":
            steps = np.abs(aligned.values.astype(int) - expected.values.astype(int))
            assert steps.max() <= 1
            assert (steps > 0).mean() < 1e-4
        else:
            np.testing.assert_allclose(aligned, expected, rtol=1e-6 if single else 1e-14, atol=0)


def test_frames_go_through_in_batches():
    aligner = Scripted()
    cube = make_cube(frames=7)
    align(cube, "first", aligner, batch_size=3)
    assert [len(call[0]) for call in aligner.calls] == [3, 3, 1]
    np.testing.assert_array_equal(aligner.seen(), cube.values)


def test_the_default_batch_is_bounded_by_bytes(monkeypatch):
    monkeypatch.setattr(torchalign.cube.run, "_CPU_BATCH_BYTES", 2 * 12 * 10 * 4 * 3)
    for dtype, sizes in (("uint8", [3, 3, 1]), ("float64", [1] * 7)):
        aligner = Scripted()
        align(make_cube(dtype, frames=7), "first", aligner)
        assert [len(call[0]) for call in aligner.calls] == sizes


@pytest.mark.parametrize("reference", ["first", "median"])
def test_memory_is_set_by_the_batch_size(reference, monkeypatch):
    """Beside the result itself; tracemalloc sees numpy's memory, where every batch enters and leaves."""
    monkeypatch.setattr(torchalign.cube.reference, "_REFERENCE_BYTES", 2**18)
    extra = {}
    for frames in (16, 64):
        cube = make_cube("uint8", frames=frames, bands=1, height=64, width=64)
        aligner = Scripted(0, 0)
        aligner.calls = type("Forgetful", (list,), {"append": lambda self, item: None})()
        tracemalloc.start()
        align(cube, reference, aligner, batch_size=4)
        extra[frames] = tracemalloc.get_traced_memory()[1] - cube.nbytes
        tracemalloc.stop()
    assert extra[64] < extra[16] + 200_000  # a float32 copy of the large cube takes 1 MB


def test_no_gradients_and_the_cube_is_not_written():
    cube = make_cube()
    before = cube.copy(deep=True)

    class Spoiler(Scripted):
        def forward(self, cube, reference, mask=None, reference_mask=None, *, init=None):
            self.recorded = (cube * torch.ones(1, requires_grad=True)).requires_grad
            result = super().forward(cube, reference, mask, reference_mask)
            cube.zero_(), reference.mul_(1)
            return result

    spoiler = Spoiler()
    align(cube, "first", spoiler)
    assert spoiler.recorded is False
    xr.testing.assert_identical(cube, before)
    cube.values.flags.writeable = False
    align(cube, cube[0], Scripted(), mask=np.broadcast_to(True, (12, 10)))


def test_a_file_is_read_batch_by_batch(tmp_path):
    pytest.importorskip("h5py")
    pytest.importorskip("h5netcdf")
    cube = make_cube("int16", frames=9, name="cube")
    cube.to_netcdf(tmp_path / "cube.nc", engine="h5netcdf")
    expected, _ = align(cube, "median", Scripted(1.5, 0))
    with xr.open_dataarray(tmp_path / "cube.nc", engine="h5netcdf") as lazy:
        aligned, _ = align(lazy.transpose("y", "x", "time", "band"), "median", Scripted(1.5, 0), batch_size=2)
        assert not lazy.variable._in_memory
    np.testing.assert_array_equal(aligned.transpose(*cube.dims), expected)


class Bar:
    """What tqdm was asked for."""

    made: list[Bar] = []  # noqa: RUF012

    def __init__(self, total, **options):
        self.total, self.options, self.count = total, options, 0
        Bar.made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def update(self, frames):
        self.count += frames


def test_progress(monkeypatch):
    tqdm = pytest.importorskip("tqdm")
    monkeypatch.setattr(tqdm, "tqdm", Bar)
    monkeypatch.setattr(Bar, "made", [])
    for progress in (True, None, False):
        align(make_cube(frames=5), "first", Scripted(), batch_size=2, progress=progress)
    always, when_long = Bar.made
    assert (always.total, always.count) == (5, 5)
    assert (when_long.total, when_long.count) == (5, 5)
    assert "delay" not in always.options
    assert when_long.options["delay"] >= 1
    assert when_long.options["disable"] is None


def test_progress_without_tqdm(monkeypatch):
    real = builtins.__import__

    def without_tqdm(name, *args, **kwargs):
        if name == "tqdm":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    align(make_cube(), "first", Scripted())
    align(make_cube(), "first", Scripted(), progress=False)
    with pytest.raises(ImportError, match=r"^progress: expected tqdm, got no such package; pip install tqdm"):
        align(make_cube(), "first", Scripted(), progress=True)


# --- the report ---


def test_the_report():
    cube = make_cube()
    cube[2] = np.nan
    _, report = align(cube, "median", Scripted(1.5, -0.5, flag=[3]), batch_size=3)
    assert set(report.data_vars) >= {"warp", "shift_x", "shift_y", "score", "score_before", "sigma", "status"}
    xr.testing.assert_identical(report.time, cube.time)
    assert report.warp.dims == ("time", "row", "col")
    np.testing.assert_array_equal(report.warp[0], [[1, 0, 1.5], [0, 1, -0.5]])
    np.testing.assert_array_equal(report.warp[2], [[1, 0, 0], [0, 1, 0]])
    np.testing.assert_array_equal(report.shift_x, [1.5, 1.5, 0, 0])
    np.testing.assert_array_equal(report.shift_y, [-0.5, -0.5, 0, 0])
    np.testing.assert_array_equal(report.status, [0, 0, 3, 5])
    np.testing.assert_array_equal(report.status_name, ["OK", "OK", "NO_TEXTURE", "NOT_BETTER"])
    np.testing.assert_allclose(report.sigma, 0.05)
    np.testing.assert_allclose(report.score_before, 0.25)
    assert report.status.dtype == np.int8
    assert report.status.attrs["flag_values"].tolist() == [int(code) for code in Status]
    assert report.status.attrs["flag_meanings"].split() == [code.name for code in Status]
    assert report.shift_x.attrs["units"] == "pixel"
    assert all("long_name" in report[name].attrs for name in report.data_vars)
    assert report.attrs["frames"] == 4
    assert report.attrs["frames_aligned"] == 2
    assert report.attrs["status_counts"] == "OK: 2, NO_TEXTURE: 1, NOT_BETTER: 1"
    assert report.attrs["reference"] == "median (of all frames as they are: pairs place 0)"
    assert report.attrs["aligner"] == repr(Scripted())
    assert report.attrs["Conventions"].startswith("CF-")
    assert "torchalign_version" in report.attrs


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda c: "mean", "mean (of all frames as they are: pairs place 0)"),
        (lambda c: "first", "first"),
        (lambda c: "2020-05-06", "2020-05-06T10:30"),
        (lambda c: np.datetime64("2020-05-06"), "2020-05-06T10:30"),
        (lambda c: datetime.date(2020, 5, 6), "2020-05-06T10:30"),
        (lambda c: c.time[1], "2020-05-06T10:30"),
        (lambda c: c.time.values[1], "2020-05-06T10:30"),
        (lambda c: c[1], "DataArray"),
        (lambda c: c.values[1], "ndarray"),
    ],
)
def test_the_report_names_the_reference(make, expected):
    cube = make_cube()
    assert align(cube, make(cube), Scripted())[1].attrs["reference"] == expected


def test_the_report_names_labels_of_other_kinds():
    cube = make_cube()
    days = cube.assign_coords(time=cube.time.dt.floor("D"))
    years = cube.assign_coords(time=[2017, 2018, 2019, 2020])
    for labelled, label, expected in (
        (days, np.datetime64("2020-05-06"), "2020-05-06"),
        (years, 2018, "2018"),
    ):
        assert align(labelled, label, Scripted())[1].attrs["reference"] == expected
    name = align(years, np.int64(2018), Scripted())[1].attrs["reference"]
    assert name == "2018"


@pytest.mark.parametrize("labelled", [True, False])
def test_the_report_keeps_the_coords_along_time(labelled):
    cube = make_cube().assign_coords(
        platform=("time", list("abab"), {"long_name": "satellite"}),
        tile=("time", np.arange(4)),
        sun=(("time", "band"), np.ones((4, 2))),
        orbit=7,
        row=("time", [31, 32, 31, 32]),  # the report has a dim and a variable of these names
        status=("time", list("good")),
    )
    cube = cube if labelled else cube.drop_vars("time")
    for order in (cube.dims, ("x", "time", "y", "band")):
        aligned, report = align(cube.transpose(*order), "first", Scripted(), batch_size=3)
        assert set(report.coords) == {"platform", "tile"} | ({"time"} if labelled else set())
        for name in report.coords:
            xr.testing.assert_identical(report[name].variable, cube[name].variable)
        assert report.status.dtype == np.int8
        assert report.warp.shape == (4, 2, 3)
        assert set(aligned.coords) == set(cube.coords)


def test_the_report_keeps_an_index_of_several_levels_and_loads_what_is_lazy():
    dask = pytest.importorskip("dask.array")
    cube = make_cube().assign_coords(time=range(4), tile=("time", dask.from_array(np.arange(4))))
    _, report = align(cube, cube[0], Scripted())
    assert isinstance(report.tile.variable.data, np.ndarray)
    levels = cube.drop_vars(["time", "tile"]).assign_coords(
        year=("time", [1, 1, 2, 2]), part=("time", [1, 2, 1, 2])
    )
    levels = levels.set_index(time=["year", "part"])
    _, report = align(levels, levels[0], Scripted())
    assert report.sel(year=2, part=1).status.size == 1


def test_the_shift_is_that_of_the_centre():
    angle = 0.1
    matrix = np.array([[np.cos(angle), -np.sin(angle), 3.0], [np.sin(angle), np.cos(angle), -1.0]])
    third_row = np.array([[1e-4, -2e-4, 1.0]])
    center = np.array([4.5, 5.5, 1])  # of 12 x 10 pixels
    for rows in (matrix, np.concatenate([matrix, third_row])):

        class Turning(Scripted):
            def forward(self, *args, rows=rows, **options):
                aligned, estimate = super().forward(*args, **options)
                warp = torch.tensor(rows).expand(len(aligned), -1, -1)
                return Alignment(aligned, estimate._replace(warp=warp))

        _, report = align(make_cube("float64"), "first", Turning(), batch_size=3)
        moved = rows @ center
        moved = moved[:2] / (moved[2] if len(rows) == 3 else 1) - center[:2]
        assert report.warp.shape == (4, *rows.shape)
        np.testing.assert_allclose(report.shift_x, moved[0], atol=1e-9)
        np.testing.assert_allclose(report.shift_y, moved[1], atol=1e-9)


UTM = 'PROJCS["WGS 84 / UTM zone 33N",GEOGCS["WGS 84",UNIT["degree",0.0174532925199433]],UNIT["metre",1]]'
FEET = (
    'PROJCRS["x",BASEGEOGCRS["y",ELLIPSOID["z",1,2,LENGTHUNIT["metre",1]]],'
    'CS[Cartesian,2],ANGLEUNIT["degree",0.01],LENGTHUNIT["US survey foot", 0.3048]]'
)
DEGREES = 'GEOGCS["WGS 84",SPHEROID["WGS 84",6378137,298.25],UNIT["degree",0.0174532925199433]]'


@pytest.mark.parametrize(
    ("units", "wkt", "metres"),
    [("m", None, 1), ("metre", None, 1), ("Meters", None, 1), ("km", None, 1000), (None, UTM, 1),
     ("", UTM, 1), (None, FEET, 0.3048), (None, DEGREES, None), ("degrees_north", UTM, None),
     (None, None, None)],
)  # fmt: skip
def test_metres_where_the_map_has_a_unit_of_length(units, wkt, metres):
    cube = make_cube().transpose("band", "y", "time", "x")
    if units is not None:
        cube.x.attrs["units"] = cube.y.attrs["units"] = units
    if wkt is not None:
        cube = cube.assign_coords(spatial_ref=((), 0, {"spatial_ref": wkt}))
    _, report = align(cube, "first", Scripted(1.5, -0.5))
    if metres is None:
        assert not {"shift_x_metres", "shift_y_metres"} & set(report.data_vars)
        return
    # north-up, 10 units a pixel: right is east, and up the rows is north
    np.testing.assert_allclose(report.shift_x_metres, 15 * metres)
    np.testing.assert_allclose(report.shift_y_metres, 5 * metres)
    assert report.shift_y_metres.attrs["units"] == "m"
    south_up = cube.assign_coords(y=cube.y[::-1].values)
    if units is not None:
        south_up.y.attrs["units"] = units
    _, report = align(south_up, "first", Scripted(1.5, -0.5))
    np.testing.assert_allclose(report.shift_y_metres, -5 * metres)


def test_metres_of_a_crs_that_rioxarray_holds():
    pytest.importorskip("rioxarray")
    for cube in (make_cube().rio.write_crs("EPSG:32633"), make_cube().assign_attrs(crs="EPSG:3857")):
        _, report = align(cube, "first", Scripted(1.5, -0.5))
        np.testing.assert_allclose(report.shift_y_metres, 5)
    _, report = align(make_cube().rio.write_crs("EPSG:4326"), "first", Scripted())
    assert "shift_x_metres" not in report


@pytest.mark.parametrize("where", ["attrs", "encoding"])
def test_metres_of_a_grid_mapping_of_another_name(where, monkeypatch):
    monkeypatch.delattr(xr.DataArray, "rio", raising=False)
    cube = make_cube().assign_coords(utm=((), 0, {"crs_wkt": UTM}))
    getattr(cube, where)["grid_mapping"] = "utm"
    np.testing.assert_allclose(align(cube, "first", Scripted(1.5, -0.5))[1].shift_y_metres, 5)


@pytest.mark.parametrize("change", [
    lambda x: np.where(x == x[4], x + 3, x), lambda x: x[np.random.default_rng(0).permutation(len(x))],
    lambda x: x * 0, lambda x: x.astype("datetime64[s]"),
])  # fmt: skip
def test_no_metres_on_an_irregular_grid(change):
    cube = make_cube()
    cube = cube.assign_coords(
        x=("x", change(cube.x.values), {"units": "m"}), y=("y", cube.y.values, {"units": "m"})
    )
    _, report = align(cube, "first", Scripted())
    assert "shift_x_metres" not in report
    assert "shift_y_metres" in report


def test_metres_of_coordinates_in_single_precision():
    y = (5_000_000 - 10.3 * np.arange(12)).astype("float32")  # half a metre apart
    assert np.ptp(np.diff(y)) >= 0.5
    cube = make_cube().assign_coords(y=("y", y, {"units": "m"}))
    np.testing.assert_allclose(align(cube, "first", Scripted(0, 1))[1].shift_y_metres, -10.3, rtol=0.01)


def test_cubes_without_coordinates():
    cube = xr.DataArray(make_cube().values, dims=("time", "band", "y", "x"))
    aligned, report = align(cube, "median", Scripted(), mask=cube[:, 0] > 30)
    assert not aligned.coords
    assert not report.coords
    assert "shift_x_metres" not in report


@pytest.mark.parametrize("kind", ["netcdf", "zarr"])
@pytest.mark.filterwarnings("ignore:.*(consolidated|Zarr|zarr).*")
def test_the_report_and_the_cube_can_be_written(tmp_path, kind):
    for package in ("h5py", "h5netcdf") if kind == "netcdf" else ("zarr",):
        pytest.importorskip(package)
    cube = make_cube("int16", name="cube").assign_attrs(_FillValue=-1)
    cube.x.attrs["units"] = cube.y.attrs["units"] = "m"
    cube[2] = -1
    aligned, report = align(cube, cube[0], Scripted(1.5, 0))
    path = tmp_path / f"report.{kind}"
    if kind == "netcdf":
        report.to_netcdf(path, engine="h5netcdf")
        aligned.to_netcdf(tmp_path / "cube.nc", engine="h5netcdf")
        back = xr.open_dataset(path, engine="h5netcdf")
    else:
        report.to_zarr(path)
        aligned.to_dataset().to_zarr(tmp_path / "cube.zarr")
        back = xr.open_zarr(path, chunks=None)
    with back:
        xr.testing.assert_equal(back, report)
        assert back.status.dtype == np.int8
        assert list(back.status.attrs["flag_values"]) == [int(code) for code in Status]
        assert back.attrs["status_counts"] == "OK: 3, NO_TEXTURE: 1"


# --- with PCC ---


@pytest.mark.parametrize("aligner", [Scripted(), PCC()], ids=["scripted", "pcc"])
@pytest.mark.parametrize("reference", ["median", "mean", "first"])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "int64"])
def test_no_frame_and_one_frame(aligner, reference, dtype):
    cube = make_cube(dtype, height=32, width=30)
    aligned, report = align(cube[:0], reference, aligner)
    assert aligned.shape == (0, 2, 32, 30)
    assert report.warp.shape == (0, 2, 3)
    assert report.attrs["frames"] == 0
    aligned, report = align(cube[:1], reference, aligner)
    assert aligned.shape == (1, 2, 32, 30)
    assert report.sizes["time"] == 1


@pytest.mark.parametrize("dtype", ["float32", "float64", "uint16"])
def test_pcc_finds_exact_shifts(dtype):
    cube, shifts = make_series(dtype=dtype)
    aligned, report = align(cube, "first", PCC())
    np.testing.assert_allclose(report.shift_x[1:], shifts[1:, 0], atol=0.05)
    np.testing.assert_allclose(report.shift_y[1:], shifts[1:, 1], atol=0.05)
    inside = (slice(1, None), slice(None), slice(6, -6), slice(6, -6))
    error = np.abs(aligned.values.astype(float) - cube.values[:1].astype(float))[inside]
    before = np.abs(cube.values.astype(float) - cube.values[:1].astype(float))[inside]
    assert error.mean() < 0.05 * before.mean()


def test_real_sentinel2_series(shared_data):
    """All 68 dates in one call: dims, and which frames are left alone. The numbers: ``test_accuracy.py``."""
    folder = shared_data / "sentinel2_ndvi"
    times = [stamp[:19] for stamp in json.loads((folder / "timestamps.json").read_text())]
    dims = ("time", "y", "x", "band")
    cube = xr.DataArray(np.load(folder / "NDVI.npy"), {"time": np.array(times, "datetime64[ns]")}, dims)
    clouds = cube.copy(data=np.load(folder / "CLM.npy")).isel(band=0)
    aligned, report = align(cube, "median", "auto", mask=clouds == 0)
    assert aligned.dims == dims
    wholly_clouded = (clouds.mean(("y", "x")) > 0.99).values
    assert wholly_clouded.any()
    assert (report.status[wholly_clouded] != Status.OK).all()
    good = report.status.values == Status.OK
    assert good.any()
    xr.testing.assert_identical(aligned[~good], cube[~good])
    assert (aligned != cube).any()
    xr.testing.assert_identical(report.time, cube.time)
