"""A reference of another sensor, brought onto the grid of a cube."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import xarray as xr

from torchalign._check import message, require
from torchalign.cube.georeference import Georeference, crs_name, find_georeference, gdal_errors, is_same_grid
from torchalign.cube.labels import Cube, spatial_dims
from torchalign.cube.pixels import as_floats

# A reference whose pixels are this much smaller than the cube's is averaged, a coarser one interpolated.
_FINER = 1.5


def onto_grid(other: xr.DataArray, cube: Cube) -> tuple[xr.DataArray, str]:
    """Another picture of the cube's place, (…, y, x), on the cube's grid; and what was done to it, in words.

    Where both say where they lie (CRS and coordinates) and their grids differ, GDAL's warper averages it where its pixels
    are smaller, and interpolates it else. If it has none of the cube's bands, it is the mean of its bands.
    """
    done = []
    dims, labels = spatial_dims(other, cube), cube.coordinate("band")
    own = set() if labels is None else {*labels.values.tolist()}
    theirs = {*other[dims["band"]].values.tolist()} if dims.get("band") in other.coords else set()
    if own and theirs and not own & theirs:
        done.append(f"the mean of its {other.sizes[dims['band']]} bands")
        other = as_floats(other).mean([dims.pop("band")], skipna=True, keep_attrs=True)
        other.attrs.pop("_FillValue", None)
    if {"y", "x"} <= set(dims) and other.ndim <= 3:
        there, here = find_georeference(Cube(other, dims)), find_georeference(cube)
        if there and here and there.crs and here.crs and not is_same_grid(there, here):
            other = _reproject(other, dims, there, cube, here)
            done.append("resampled onto the cube's grid")
    return other, ", ".join(done)


def _reproject(
    other: xr.DataArray, dims: dict[str, Hashable], there: Georeference, cube: Cube, here: Georeference
) -> xr.DataArray:
    """(…, H, W) float32, NaN where the picture does not reach."""
    require("a reference on another grid", "io", "rasterio")
    from rasterio.transform import Affine
    from rasterio.warp import Resampling, reproject

    values = as_floats(other).astype(np.float32)
    values = values.transpose(..., dims["y"], dims["x"])
    steps = [abs(np.linalg.det(grid.linear)) ** 0.5 for grid in (there, here)]
    averaged = there.crs == here.crs and steps[1] > _FINER * steps[0]
    moved = np.full((*values.shape[:-2], *here.size), np.nan, np.float32)
    how = {"src_transform": Affine(*there.transform), "src_crs": there.crs, "src_nodata": np.nan}
    how |= {"dst_transform": Affine(*here.transform), "dst_crs": here.crs, "dst_nodata": np.nan}
    try:
        kernel = Resampling.average if averaged else Resampling.bilinear
        reproject(values.to_numpy(), moved, resampling=kernel, **how)
    except gdal_errors() as error:
        got = f"{crs_name(there.crs)} for {crs_name(here.crs)} ({error})"
        cure = "reproject it, with .rio.reproject_match(datacube)"
        raise ValueError(message("reference", "a picture of the cube's place", got, cure)) from error
    kept = {dim: values[dim] for dim in values.dims[:-2] if dim in values.coords}
    own = {cube.dims[role]: cube.coordinate(role) for role in ("y", "x")}
    coordinates = kept | {dim: labels for dim, labels in own.items() if labels is not None}
    return xr.DataArray(moved, coordinates, (*values.dims[:-2], *own))
