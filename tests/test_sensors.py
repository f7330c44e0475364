"""A reference of another sensor: other pixels, another CRS, other bands."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

import torchalign as ta
from torchalign.cube.labels import Cube
from torchalign.cube.regrid import onto_grid

pytest.importorskip("rioxarray")


def on_map(x, y):
    """A scene over map coordinates in metres: plane waves, so that any grid can be sampled exactly."""
    random = np.random.default_rng(3)
    value = np.zeros(np.broadcast_shapes(np.shape(x), np.shape(y)))
    for wavelength, angle, phase in zip(
        random.uniform(60, 500, 60), random.uniform(0, 6.28, 60), random.uniform(0, 6.28, 60), strict=True
    ):
        wave = (x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / wavelength + phase
        value += np.sqrt(wavelength) * np.cos(wave)
    return value / value.std()


def raster(x, y, crs, values):
    array = xr.DataArray(values.astype("float32"), coords={"y": y, "x": x}, dims=("y", "x"))
    return array.rio.write_crs(crs)


def cube_on_map(crs="EPSG:32633", shift=(1.3, -0.6)):
    x, y = 500_000 + 10 * np.arange(128) + 5.0, 5_000_000 - 10 * np.arange(128) - 5.0
    # content displaced by (−dx, −dy) pixels: the shift that brings it back is (dx, dy)
    frame = on_map(x + 10 * shift[0], (y - 10 * shift[1])[:, None])
    return raster(x, y, crs, frame).expand_dims(time=[0])


def test_a_reference_of_other_pixels_is_brought_onto_the_cubes_grid():
    cube = cube_on_map()
    x, y = 499_000 + 7 * np.arange(420) + 3.0, 5_001_000 - 7 * np.arange(420) - 3.0
    reference = raster(x, y, "EPSG:32633", on_map(x, y[:, None]))
    aligned, report = ta.align(cube, reference, "pcc")
    assert "resampled onto the cube's grid" in report.attrs["reference"]
    np.testing.assert_allclose([report.shift_x[0], report.shift_y[0]], [1.3, -0.6], atol=0.03)
    assert aligned.sizes == cube.sizes


def test_smaller_pixels_are_averaged():
    cube = cube_on_map()
    x, y = 500_000 + 2 * np.arange(640) + 1.0, 5_000_000 - 2 * np.arange(640) - 1.0
    noise = np.random.default_rng(0).standard_normal((640, 640))
    moved, done = onto_grid(raster(x, y, "EPSG:32633", noise), Cube.of(cube, {}))
    assert done == "resampled onto the cube's grid"
    np.testing.assert_allclose(moved, noise.reshape(128, 5, 128, 5).mean((1, 3)), atol=1e-5)


def test_a_reference_of_another_zone_and_of_other_bands():
    from rasterio.warp import transform

    cube = cube_on_map().expand_dims(band=["red"], axis=1)
    x, y = np.meshgrid(36_000 + 12 * np.arange(190.0), 5_020_000 - 12 * np.arange(190.0))
    east, north = (
        np.reshape(v, x.shape) for v in transform("EPSG:32634", "EPSG:32633", x.ravel(), y.ravel())
    )
    # wherever the corner lies, the window covers the cube
    offset = 500_640 - east.mean(), 4_999_360 - north.mean()
    x, y = x + offset[0], y + offset[1]
    east, north = (
        np.reshape(v, x.shape) for v in transform("EPSG:32634", "EPSG:32633", x.ravel(), y.ravel())
    )
    radar = 5 - on_map(east, north)  # contrast reversed
    reference = raster(x[0], y[:, 0], "EPSG:32634", radar)
    reference = xr.concat([reference, reference + 1], xr.Variable("band", ["vv", "vh"]))
    _, report = ta.align(cube, reference, "cross")
    assert "the mean of its 2 bands, resampled onto the cube's grid" in report.attrs["reference"]
    assert int(report.status[0]) == ta.Status.OK
    np.testing.assert_allclose([report.shift_x[0], report.shift_y[0]], [1.3, -0.6], atol=0.1)
    assert abs(float(report.residual_x[0])) < 0.1


def test_a_reference_that_shares_bands_or_has_no_crs_is_not_touched():
    cube = cube_on_map()
    same = cube[0] + 1
    assert ta.align(cube, same, "pcc")[1].attrs["reference"] == "DataArray"
    plain = same.drop_vars("spatial_ref")
    plain = plain.assign_coords(x=plain.x + 300)
    with pytest.raises(ValueError, match="cube's 'x'"):
        ta.align(cube, plain, "pcc")
