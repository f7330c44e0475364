"""Labelled series with known shifts, as satellites' archives have them: dates, bands, CRS, nodata."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import xarray as xr
from scenes import fractal_stack

import torchalign as ta

__all__ = ["UTM", "Series", "align", "make_series"]

UTM = (
    'PROJCS["WGS 84 / UTM zone 33N",GEOGCS["WGS 84",DATUM["WGS_1984",SPHEROID["WGS 84",6378137,298.257223563,'
    'AUTHORITY["EPSG","7030"]],AUTHORITY["EPSG","6326"]],PRIMEM["Greenwich",0,AUTHORITY["EPSG","8901"]],'
    'UNIT["degree",0.0174532925199433,AUTHORITY["EPSG","9122"]],AUTHORITY["EPSG","4326"]],'
    'PROJECTION["Transverse_Mercator"],PARAMETER["latitude_of_origin",0],PARAMETER["central_meridian",15],'
    'PARAMETER["scale_factor",0.9996],PARAMETER["false_easting",500000],PARAMETER["false_northing",0],'
    'UNIT["metre",1,AUTHORITY["EPSG","9001"]],AXIS["Easting",EAST],AXIS["Northing",NORTH],'
    'AUTHORITY["EPSG","32633"]]'
)


def align(cube, reference, aligner="pcc", **options):
    """With the fast aligner, where it is not the estimate that is tested."""
    return ta.align(cube, reference, aligner, **options)


class Series(NamedTuple):
    """What was made, and the truth."""

    cube: xr.DataArray  # (time, band, y, x)
    reference: xr.DataArray  # (band, y, x)
    shift: np.ndarray  # (T, 2), (x, y) in pixels, moving → reference
    clear: xr.DataArray  # (time, y, x) bool


def make_series(frames=6, size=64, *, bands=2, dtype="uint16", pixel=10.0, nodata=0, **options) -> Series:
    """Decimated windows of a fractal scene, north-up in UTM; integers are reflectance × 10,000."""
    options = {"max_shift": 2.0, "offset": 0.02, "noise": 0.002, "gain": (0.9, 1.1), "seed": 5} | options
    stack = fractal_stack(frames, size=(size, size), bands=bands, **options)
    step = np.arange(size) + 0.5
    coords = {
        "time": np.datetime64("2017-01-05T10:30:00", "ns") + np.arange(frames) * np.timedelta64(5, "D"),
        "band": [f"B{number:02d}" for number in range(2, 2 + bands)],
        "y": 5_000_040.0 - pixel * step,
        "x": 499_980.0 + pixel * step,
        "spatial_ref": ((), 0, {"crs_wkt": UTM, "spatial_ref": UTM}),
    }

    def pixels(values):
        if np.dtype(dtype).kind == "f":
            return values.astype(dtype)
        return np.clip(np.rint(values * 10_000), 1, 30_000).astype(dtype)

    cube = xr.DataArray(pixels(stack.cube.numpy()), coords, ("time", "band", "y", "x"), name="reflectance")
    if nodata is not None:
        cube.attrs["_FillValue"] = cube.dtype.type(nodata)
    reference = cube[0].drop_vars("time").copy(data=pixels(stack.reference.numpy()))
    clear = cube[:, 0].drop_vars("band").copy(data=stack.clear.numpy())
    clear.attrs = {}
    return Series(cube, reference, stack.shift.numpy().astype(np.float64), clear)
